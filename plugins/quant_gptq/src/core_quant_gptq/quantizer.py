"""Makes GPTQ checkpoints (Frantar et al. 2022): columns are rounded one after the other, and what rounding one of them
costs is made good by those that come after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from core.contracts import QuantizeSettings
from core.layers import pack_codes, unpack_codes
from core.quantize.feedback import round_columns
from core.quantize.layer import DecoderLayer

BITS, MOST, MIDDLE = 4, 15, 8
DAMP = 0.01


class GptqQuantizer:
    """A `core.contracts.Quantizer`: 4 bits, in gptqmodel's v1 packing; symmetric unless asked otherwise."""

    name = "gptq"
    calibrates = True
    sees_floats = False  # rounding makes the errors of earlier layers good, too
    group_sizes = (-1, 16, 32, 64, 128)

    def __init__(self, settings: QuantizeSettings) -> None:
        self.group_size = settings.group_size or 128
        self.symmetric = settings.symmetric is not False
        self.desc_act = bool(settings.desc_act)

    def quantize_layer(self, layer: DecoderLayer) -> Mapping[str, Mapping[str, Tensor]]:
        grams = {name: group.gram for group in layer.input_groups() for name in group.names}
        packable = {
            name: linear
            for name, linear in layer.linears.items()
            if linear.out_features % 8 == 0 and linear.in_features % 8 == 0
        }
        return {name: self._packed(linear.weight.data.float(), grams.get(name)) for name, linear in packable.items()}

    def _packed(self, weight: Tensor, gram: Tensor | None) -> Mapping[str, Tensor]:
        """Quantize a weight [out, in]; a linear that no token of the calibration reached is rounded to nearest."""
        width = weight.shape[1]
        size = width if self.group_size == -1 else self.group_size
        gram = torch.eye(width, device=weight.device) if gram is None else gram.to(weight.device)
        order = gram.diagonal().argsort(descending=True) if self.desc_act else torch.arange(width, device=weight.device)
        codes, scales, zeros = _round_columns(weight[:, order], gram[order][:, order], size, self.symmetric)
        g_idx = torch.empty(width, dtype=torch.int32, device=weight.device)
        g_idx[order] = (torch.arange(width, device=weight.device) // size).int()
        in_place = torch.empty_like(codes)
        in_place[:, order] = codes
        return {
            "qweight": _words(in_place).T.contiguous(),
            "qzeros": _words((zeros - 1).T),
            "scales": scales.T.contiguous(),
            "g_idx": g_idx,
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> Tensor:
        codes = unpack_codes(tensors["qweight"].T.contiguous().view(torch.uint8), BITS).float()
        zeros = unpack_codes(tensors["qzeros"].view(torch.uint8), BITS).float() + 1
        index = tensors["g_idx"].long()
        return (codes - zeros.T[:, index]) * tensors["scales"].float().T[:, index]

    def config(self, in_floats: Sequence[str]) -> Mapping[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": BITS,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.symmetric,
            "damp_percent": DAMP,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "dynamic": {f"-:{name.replace('.', chr(92) + '.')}": {} for name in in_floats},
        }


def _words(codes: Tensor) -> Tensor:
    """Codes [rows, n] -> int32 [rows, n / 8]."""
    return pack_codes(codes, BITS).flatten().view(torch.int32).view(len(codes), -1)


def _round_columns(weight: Tensor, gram: Tensor, size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 [out, in], scales float16 and zeros [out, groups] of a weight whose columns are in order."""
    found: list[tuple[Tensor, Tensor]] = []

    def ranges(column: int, rest: Tensor) -> tuple[Tensor, Tensor]:
        if column % size == 0:
            found.append(_range(rest[:, :size], symmetric))
        return found[-1]

    codes = round_columns(weight, gram, ranges, MOST, DAMP)
    scales, zeros = (torch.stack(values, 1) for values in zip(*found, strict=True))
    return codes, scales.half(), zeros


def _range(group: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scale (rounded to float16, as it is stored) and zero of a group [out, size]; in v1 no zero is 0."""
    low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
    if symmetric:
        most = torch.maximum(-low, high)
        low, high = -most, most
    scale = ((high - low) / MOST).clamp(2.0**-24, 65504).half().float()
    zero = torch.full_like(scale, MIDDLE) if symmetric else (-low / scale).round().clamp(1, MOST)
    return scale, zero
