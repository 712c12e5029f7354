"""AWQ's search for the scale of a group's input and for the clip of each group of weights (Lin et al. 2023).

Both minimize the error of the linears' outputs over the calibration tokens. For an error E in the weight [out, in] it
is the sum over rows e of e @ G @ e, where G = mean x.T @ x: so the search needs no activations but this one matrix,
however long the calibration text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GRID = 20  # exponents that are tried
MAX_ROWS = 512  # of a linear that the search looks at: they share the scale, and a part tells enough
CLIPS = tuple(1 - 0.05 * step for step in range(11))  # shares of the largest weight of a group

Rounder = Callable[[Tensor], Tensor]  # weight [out, in] -> the nearest that the format can hold


def best_scale(
    weights: Sequence[Tensor], gram: Tensor, mean_abs: Tensor, gather: Rounder, spread: Rounder, rounder: Rounder
) -> Tensor | None:
    """Return the scale [free] with the least output error; None if none is better than no scale.

    weights  [out, in] of the linears that share the input, gram [in, in], mean_abs [in]
    """
    sampled = [_some_rows(weight) for weight in weights]
    size = _relative_size(torch.cat(weights), rounder)
    best, least = None, _loss(sampled, None, gram, rounder)
    for candidate in _scales(gather(mean_abs), gather(size)):
        loss = _loss(sampled, spread(candidate), gram, rounder)
        if loss < least:
            best, least = candidate, loss
    return best


def _relative_size(weight: Tensor, rounder: Rounder) -> Tensor:
    """Return the mean over rows of |w| as a share of the largest of its group, [in]."""
    group = getattr(rounder, "group_size", weight.shape[1])
    grouped = weight.abs().unflatten(1, (-1, group))
    return (grouped / grouped.amax(-1, keepdim=True).clamp(1e-6)).flatten(1).mean(0)


def _scales(mean_abs: Tensor, size: Tensor) -> list[Tensor]:
    """The paper's x ** a, and x ** a / w ** (1 - a); each around 1."""
    found = []
    for step in range(1, GRID + 1):
        share = step / GRID
        plain = mean_abs.clamp(1e-4) ** share
        found += [plain, mean_abs.clamp(1e-4) ** share / (size ** (1 - share) + 1e-4)]
    found.append(1 / (size + 1e-4))
    return [scale / (scale.max() * scale.min()).sqrt() for scale in (one.clamp(1e-4) for one in found)]


def _loss(weights: Sequence[Tensor], scale: Tensor | None, gram: Tensor, rounder: Rounder) -> float:
    total = 0.0
    for weight in weights:
        rounded = rounder(weight) if scale is None else rounder(weight * scale) / scale
        error = rounded - weight
        total += float(((error @ gram) * error).sum())
    return total


def _some_rows(weight: Tensor) -> Tensor:
    if len(weight) <= MAX_ROWS:
        return weight
    return weight[torch.linspace(0, len(weight) - 1, MAX_ROWS).long()]


def best_clip(
    weight: Tensor, gram: Tensor, group_size: int, round_clipped: Callable[[Tensor, float], Tensor]
) -> Tensor:
    """Return the weight with each group's extremes cut off where that lessens the group's own output error.

    round_clipped(weight, share) rounds after every group's extremes are cut to a share of themselves.
    """
    groups = weight.shape[1] // group_size
    blocks = torch.stack([gram[i : i + group_size, i : i + group_size] for i in range(0, weight.shape[1], group_size)])
    least, best = None, weight
    for share in CLIPS:
        error = (round_clipped(weight, share) - weight).view(-1, groups, group_size)
        loss = (torch.einsum("ogi,gij->ogj", error, blocks) * error).sum(-1, keepdim=True)  # [out, groups, 1]
        cut = clip_groups(weight, share, group_size)
        if least is None:
            least, best = loss, cut
        else:
            better = (loss < least).expand(-1, -1, group_size).reshape(weight.shape)
            least, best = torch.minimum(loss, least), torch.where(better, cut, best)
    return best


def clip_groups(weight: Tensor, share: float, group_size: int) -> Tensor:
    """Cut every group's values to `share` of its largest magnitude."""
    grouped = weight.unflatten(1, (-1, group_size))
    most = grouped.abs().amax(-1, keepdim=True) * share
    return grouped.clamp(-most, most).flatten(1)
