"""Weights rounded to the nearest of 16 or 255 steps, group by group.

int8    scale = max |w| / 127                                code = round(w / scale) + 128
int4    scale = (max - min) / 15, both with 0 in between     code = round(w / scale) + zero,  zero = round(-min / scale)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from core.contracts import Checkpoint
from core.layers import AffineTensor, QuantizedTensor, pack_codes

GROUP_SIZE = 128
LEAST_GROUP, LEAST_ROWS = 16, 16
ROUNDED_AT_ONCE = 1 << 22  # weights that are rounded at the same time, to bound what that takes besides them


class IntMethod:
    """A `core.contracts.QuantMethod`."""

    on_the_fly = True

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.name = f"int{bits}"

    def tensors(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        return checkpoint.tensors()

    def quantize(self, name: str, weight: Tensor) -> Tensor:
        """Round a weight [..., out, in]; one that is too small or has no groups stays as it is."""
        group_size = group_size_of(weight.shape[-1])
        too_small = weight.shape[-2] < LEAST_ROWS or group_size < LEAST_GROUP
        if isinstance(weight, QuantizedTensor) or too_small or weight.shape[-1] % 2:
            return weight
        rows = weight.reshape(-1, weight.shape[-1])
        pieces = [
            _rounded(piece, self.bits, group_size) for piece in rows.split(max(ROUNDED_AT_ONCE // rows.shape[1], 1))
        ]
        parts = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        parts = {name: part.view(*weight.shape[:-1], part.shape[-1]) for name, part in parts.items()}
        return AffineTensor(parts, weight.shape[-1], weight.dtype, bits=self.bits, group_size=group_size)


def group_size_of(in_features: int) -> int:
    """Return 128, or the largest number below it that divides a row."""
    return next(size for size in range(min(GROUP_SIZE, in_features), 0, -1) if in_features % size == 0)


def _rounded(rows: Tensor, bits: int, group_size: int) -> dict[str, Tensor]:
    """Return the parts of rows [n, in]."""
    groups = rows.float().unflatten(-1, (-1, group_size))
    if bits == 8:
        scales = _not_zero(groups.abs().amax(-1) / 127)
        codes = torch.round(groups / scales.unsqueeze(-1)).add_(128)
        return {"codes": codes.to(torch.uint8).flatten(-2), "scales": scales}
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = _not_zero((high - low) / 15)
    zeros = torch.round(-low / scales)
    codes = torch.round(groups / scales.unsqueeze(-1)).add_(zeros.unsqueeze(-1)).clamp_(0, 15)
    return {"codes": pack_codes(codes.flatten(-2), 4), "scales": scales, "zeros": zeros.to(torch.uint8)}


def _not_zero(scales: Tensor) -> Tensor:
    """A group of zeros has scale 1: any scale is right, and none may be divided by if it is 0."""
    return torch.where(scales > 0, scales, torch.ones_like(scales))
