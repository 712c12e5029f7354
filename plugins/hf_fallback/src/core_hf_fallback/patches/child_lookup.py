"""child-lookup: a module finds its children like any attribute.

nn.Module keeps children in a dict of its own, which Python asks only after its ordinary search has failed: half a
microsecond for each `self.q_proj`, some hundred times a step. Here the same children stand among the attributes too.
Whoever sets such a child anew (nn.Module.__setattr__) takes the entry out again.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from core.kernel_contracts import Kernels
from core_hf_fallback.patches.calls import LinearCalls


def enter_children(module: nn.Module, _: LinearCalls, __: Kernels | None) -> list[Callable[[], None]]:
    """Enter the children of every module that has any; return how to undo each."""
    return [undo for part in module.modules() if part._modules and (undo := _enter(part)) is not None]


def _enter(part: nn.Module) -> Callable[[], None] | None:
    entered = {
        name: child
        for name, child in part._modules.items()
        if child is not None and name not in vars(part) and not hasattr(type(part), name)
    }
    if not entered:
        return None
    vars(part).update(entered)

    def undo() -> None:
        for name, child in entered.items():
            if vars(part).get(name) is child:
                del vars(part)[name]

    return undo
