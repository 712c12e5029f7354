"""How far two tensors [rows, width] are from each other, row by row."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def spread(plain: Tensor) -> Tensor:
    """[rows, width] -> [rows], the standard deviation of a row's finite values."""
    finite = plain.nan_to_num(posinf=0.0, neginf=0.0)
    return finite.std(-1).clamp(min=1e-6)


def distance(plain: Tensor, served: Tensor) -> Tensor:
    """The absolute difference; equal infinities (tokens that a model bans) are no difference."""
    return torch.where(plain == served, torch.zeros(()), (plain - served).abs())


def errors(plain: Tensor, served: Tensor) -> Tensor:
    """[rows, width] each -> [rows], the largest difference of a row in standard deviations of the plain one."""
    return distance(plain, served).amax(-1) / spread(plain)


def divergence(plain: Tensor, served: Tensor) -> Tensor:
    """KL(plain || served) of each row, in nats; in float64, since its terms nearly cancel."""
    p, q = plain.double().log_softmax(-1), served.double().log_softmax(-1)
    terms = torch.where(p == q, 0.0, p.exp() * (p - q))
    return torch.nan_to_num(terms.sum(-1), nan=math.inf).clamp(min=0.0)
