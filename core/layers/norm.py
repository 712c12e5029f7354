"""RMSNorm (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.layers.linear import Loader, copy_checked


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)

    def loaders(self, name: str) -> dict[str, Loader]:
        return {f"{name}.weight": copy_checked(f"{name}.weight", self.weight)}

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, (self.size,), self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), (self.size,), None, self.eps).to(x.dtype)
