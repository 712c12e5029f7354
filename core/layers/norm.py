"""RMSNorm (Zhang and Sennrich 2019)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.layers.linear import Loader, copy_checked

if TYPE_CHECKING:
    from core.kernel_contracts import Kernels, NormKernel


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self.kernel: NormKernel | None = None

    def loaders(self, name: str) -> dict[str, Loader]:
        return {f"{name}.weight": copy_checked(f"{name}.weight", self.weight)}

    def take_kernels(self, kernels: Kernels) -> None:
        """Compute with a device's kernels from now on; called when the weight is loaded."""
        self.kernel = kernels.rms_norm(self.weight.detach(), self.eps, self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is not None:
            return self.kernel(x)
        if x.dtype == torch.float32:
            return F.rms_norm(x, (self.size,), self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), (self.size,), None, self.eps).to(x.dtype)

    def of_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return the norm of x[rows]; x [tokens, size], rows [n] int64."""
        return self.forward(x[rows]) if self.kernel is None else self.kernel.of_rows(x, rows)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add x to `residual`, in place, and return the norm of that."""
        if self.kernel is not None:
            return self.kernel.add(x, residual, residual)
        return self.forward(residual.add_(x))
