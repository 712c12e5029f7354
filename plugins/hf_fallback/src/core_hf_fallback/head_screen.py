"""HeadScreen: where only the highest logits are wanted, a module's head computes no others exactly.

Right only where nothing follows the head: what a module gives back as logits must be the very tensor that its head
made. Every forward shows that for the next one; one that does otherwise after all is run again with all logits.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from core.kernel_contracts import Kernels
from core.layers import ScreenedHead, screen_of


class HeadScreen:
    """The forward of a module's output embeddings."""

    def __init__(self, plain: Callable[[Tensor], Tensor], screened: ScreenedHead) -> None:
        self.plain, self.screened = plain, screened
        self.is_on = False  # in this forward
        self.is_last = False  # the last forward gave back what the head had made
        self.made: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        self.made = self.screened.highest(x) if self.is_on and self.screened.takes(x) else self.plain(x)
        return self.made

    def run(self, forward: Callable[[], Tensor], only_highest: bool) -> Tensor:
        """Return the logits of a forward of the module."""
        self.is_on = only_highest and self.is_last
        try:
            logits = self._run(forward)
            if self.is_on and not self.is_last:
                self.is_on = False
                logits = self._run(forward)
            return logits
        finally:
            self.is_on, self.made = False, None

    def _run(self, forward: Callable[[], Tensor]) -> Tensor:
        logits = forward()
        self.is_last = logits is self.made
        return logits


def put_screen(module: nn.Module, kernels: Kernels | None) -> HeadScreen | None:
    """Put a screen in the place of the forward of a module's head; None where there is none for it."""
    head = getattr(module, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        return None
    screened = screen_of(head, kernels)
    if screened is None:
        return None
    screen = HeadScreen(head.forward, screened)
    vars(head).update(forward=screen, screen=screen)
    return screen


def screen_on(head: nn.Module) -> HeadScreen | None:
    """Return a head's screen while it is used."""
    found: HeadScreen | None = vars(head).get("screen")
    return found if found is not None and found.is_on else None
