"""Rounding to nearest into AWQ's format: 4 bit codes, a float16 scale and a zero for each group of a row's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 15  # the largest code


@dataclass(frozen=True)
class Rounding:
    """weight ~ (code - zero) * scale over groups of `group_size`; without zero points the zero is 8."""

    group_size: int
    symmetric: bool = False

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes [out, in], scales [out, groups] in float16 and zeros [out, groups] of a weight [out, in]."""
        grouped = weight.float().unflatten(1, (-1, self.group_size))
        if self.symmetric:
            scales = grouped.abs().amax(-1) / 7
            zeros = torch.full_like(scales, 8)
        else:
            low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
            scales = (high - low) / MOST
            zeros = (-low / scales.clamp(1e-12)).round().clamp(0, MOST)
        scales = scales.clamp(2.0**-24, 65504).half()  # the range of float16
        found = (grouped / scales.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)
        return found.clamp(0, MOST).flatten(1), scales, zeros

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the nearest weight that the format holds, float32 [out, in]."""
        codes, scales, zeros = self.codes(weight)
        grouped = codes.unflatten(1, (-1, self.group_size)) - zeros.unsqueeze(-1)
        return (grouped * scales.float().unsqueeze(-1)).flatten(1)
