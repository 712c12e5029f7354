"""Rounds a weight's columns one after the other: what rounding one of them costs is made good, as far as the inputs
allow, by those that come after (Frantar et al. 2022).

For inputs with H = mean x.T @ x, rounding column j with error e moves the columns k > j by -e * U[j, k] / U[j, j],
where U is the upper Cholesky factor of H's inverse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128  # columns whose errors are carried on together

# (column, the weights from it on as they are by then) -> the column's scale [out] and zero [out]
Ranges = Callable[[int, Tensor], tuple[Tensor, Tensor]]


def round_columns(weight: Tensor, gram: Tensor, ranges: Ranges, most: int, damp: float) -> Tensor:
    """Return codes uint8 [out, in] of a weight [out, in] whose columns are in the order in which they are rounded.

    gram  [in, in], mean x.T @ x; damp, as a share of the mean of its diagonal, is added to that
    most  the largest code
    """
    weight, width = weight.clone(), weight.shape[1]
    dead = gram.diagonal() <= 0
    weight[:, dead] = 0
    upper = _inverse_factor(gram, dead, damp)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        errors = torch.zeros(len(weight), end - start, device=weight.device)
        for column in range(start, end):
            scale, zero = ranges(column, weight[:, column:])
            code = (weight[:, column] / scale + zero).round().clamp(0, most)
            codes[:, column] = code.to(torch.uint8)
            error = (weight[:, column] - (code - zero) * scale) / upper[column, column]
            weight[:, column:end] -= error[:, None] * upper[column, column:end]
            errors[:, column - start] = error
        weight[:, end:] -= errors @ upper[start:end, end:]
    return codes


def _inverse_factor(gram: Tensor, dead: Tensor, damp: float) -> Tensor:
    """Return the upper Cholesky factor of the damped matrix's inverse, float32 [in, in]."""
    damped = gram.double() + torch.diag(dead.double())
    damped.diagonal().add_(damp * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
