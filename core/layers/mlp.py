"""The gated feed-forward block: down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.layers.linear import Linear, Loader, MergedLinear

if TYPE_CHECKING:
    from core.kernel_contracts import GateKernel, Kernels


class GatedMLP(nn.Module):
    """x [tokens, size] -> [tokens, size]; gate and up are one linear."""

    def __init__(self, size: int, inner: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = MergedLinear(size, [inner, inner], bias, dtype)
        self.down = Linear(inner, size, bias, dtype)
        self.dtype = dtype
        self.kernel: GateKernel | None = None

    def loaders(self, name: str) -> dict[str, Loader]:
        parts = self.gate_up.merged_loaders([f"{name}.gate_proj", f"{name}.up_proj"])
        return parts | self.down.loaders(f"{name}.down_proj")

    def take_kernels(self, kernels: Kernels) -> None:
        """Compute with a device's kernels from now on."""
        self.kernel = kernels.gate("silu", self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self._gated(self.gate_up(x)))
        return out

    def _gated(self, gate_up: Tensor) -> Tensor:
        if self.kernel is not None:
            return self.kernel(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up
