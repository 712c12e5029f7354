"""The gated feed-forward block: down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.layers.linear import Linear, Loader, MergedLinear


class GatedMLP(nn.Module):
    """x [tokens, size] -> [tokens, size]; gate and up are one linear."""

    def __init__(self, size: int, inner: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = MergedLinear(size, [inner, inner], bias, dtype)
        self.down = Linear(inner, size, bias, dtype)

    def loaders(self, name: str) -> dict[str, Loader]:
        parts = self.gate_up.merged_loaders([f"{name}.gate_proj", f"{name}.up_proj"])
        return parts | self.down.loaders(f"{name}.down_proj")

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out
