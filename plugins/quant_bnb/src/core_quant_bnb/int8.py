"""LLM.int8: bytes from -127 to 127 and the largest magnitude of each row (Dettmers 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from core.layers import AffineTensor

INVERSE_127 = 7.874015718698502e-3  # as bitsandbytes writes it


class Int8RowTensor(AffineTensor):
    """An AffineTensor of 8 bits, one group a row, with one part more: `absmax` [..., out, 1].

    Kernels use `scales` = absmax / 127. `decode` multiplies with absmax first and then divides, as bitsandbytes does:
    the last bit may differ.
    """

    def decode(self) -> Tensor:
        numbers = (self.parts["codes"] ^ 128).view(torch.int8)
        return numbers * self.parts["absmax"] * INVERSE_127


def make_tensor(numbers: Tensor, absmax: Tensor, dtype: torch.dtype) -> Int8RowTensor:
    """Return the weight of numbers int8 [..., out, in] and absmax float32 [..., out]."""
    absmax = absmax.unsqueeze(-1)
    parts = {"codes": numbers.view(torch.uint8) ^ 128, "scales": absmax * INVERSE_127, "absmax": absmax}
    return Int8RowTensor(parts, numbers.shape[-1], dtype, bits=8, group_size=numbers.shape[-1])


def quantize(weight: Tensor) -> Int8RowTensor:
    """Return weight [..., out, in] as bitsandbytes' Int8Params makes it, by way of float16."""
    halves = weight.to(torch.float16)
    absmax = halves.abs().amax(-1).float()
    scaled = halves * (127.0 / absmax).unsqueeze(-1)
    numbers = scaled.nan_to_num_(0.0).round_()  # a row of zeros was multiplied with infinity
    return make_tensor(numbers.to(torch.int8), absmax, weight.dtype)
