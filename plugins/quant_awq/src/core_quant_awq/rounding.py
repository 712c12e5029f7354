"""Rounding to nearest into AWQ's format: 4 bit codes, a float16 scale and a zero for each group of a row's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.quantize.feedback import round_columns

MOST = 15  # the largest code
DAMP = 0.05  # of the mean square of an input, added to each: what calibration says of rare inputs is not sure
# How much of what inputs have in common on the calibration text rounding relies on. All of it is best on such text and
# worse than none on another.
TRUST = 0.3


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


def codes_with_feedback(weight: Tensor, gram: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return codes [out, in] for scales and zeros that are settled; the inputs that are largest come first."""
    gram = TRUST * gram + (1 - TRUST) * torch.diag(gram.diagonal())
    order = gram.diagonal().argsort(descending=True)
    size = weight.shape[1] // scales.shape[1]
    groups, steps = (order // size).tolist(), scales.float()

    def ranges(column: int, rest: Tensor) -> tuple[Tensor, Tensor]:
        return steps[:, groups[column]], zeros[:, groups[column]]

    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    codes[:, order] = round_columns(weight[:, order], gram[order][:, order], ranges, MOST, DAMP)
    return codes
