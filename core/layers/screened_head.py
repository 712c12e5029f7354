"""A head of which only the highest logit of each row is wanted: of tokens that cannot be it a bound is enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from core.layers.stack import kernels_of

if TYPE_CHECKING:
    from core.kernel_contracts import Kernels, LinearKernel


class ScreenedHead:
    """A head and the kernel that finds its highest logits (`core.kernel_contracts.Kernels.highest`)."""

    def __init__(self, head: nn.Module, kernel: LinearKernel) -> None:
        self.kernel = kernel
        self._hooks = [hooks for part in head.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks)]

    @property
    def is_hooked(self) -> bool:
        """True while somebody looks at what goes in or out of the head."""
        return any(self._hooks)

    def takes(self, x: Tensor) -> bool:
        return x.dtype is torch.float32 and not self.is_hooked

    def highest(self, x: Tensor) -> Tensor:
        """Return logits [..., vocab] of x [..., hidden], float32, of which those of each row are as the head gives them
        that are the highest; all others are lower."""
        return self.kernel(x)


def screen_of(head: nn.Module, kernels: Kernels | None) -> ScreenedHead | None:
    """Return a packed head with its screen; None where the kernels have none for it."""
    find = getattr(kernels, "highest", None)  # kernels that do not say have none
    linears = kernels_of(head)
    if find is None or len(linears) != 1:
        return None
    kernel = find(linears[0])
    return None if kernel is None else ScreenedHead(head, kernel)
