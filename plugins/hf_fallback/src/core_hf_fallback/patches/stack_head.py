"""The last norm and the head, in the one call of a stack's layers, for steps that want the logits of every token.

The module still calls both by itself. Its norm notes what it made of the stack's output; its head hands out the logits
that are there already, if it is given just that, number by number. Whatever else it is given it multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.kernel_contracts import HeadParts
from core.layers import kernels_of
from core_hf_fallback.head_screen import screen_on
from core_hf_fallback.patches.operations import Norm


@dataclass
class Ahead:
    """What is computed before the module asks for it."""

    out: Tensor  # of the stack, [1, tokens, hidden]
    logits: Tensor  # [tokens, vocab]
    normed: Tensor | None = None  # what the module's norm made of `out`


class StackHead:
    """The norm and the head of a module, and what they know of a forward."""

    def __init__(self, norm: nn.Module, head: nn.Module, parts: HeadParts, vocab: int) -> None:
        self.norm, self.head, self.parts, self.vocab = norm, head, parts, vocab
        self.ahead: Ahead | None = None
        self.is_used = True  # False: the module's head was given something else
        self.was_used = False  # the module's head was given just this: nobody else looks at the stack's output

    def logits_for(self, x: Tensor, wanted: int) -> Tensor | None:
        """Return where the logits of x [tokens, hidden] are to stand; None if they are not worth it."""
        if not self.is_used or wanted != len(x):
            return None
        screen = screen_on(self.head)
        if screen is not None and self.was_used:
            return None
        if screen is not None:
            screen.is_on = False  # this once: whether the head is given just this is seen where it is computed so
        return x.new_empty(len(x), self.vocab)

    def replace(self) -> list[Callable[[], None]]:
        """Replace the forward of both; return how to undo it."""
        plain = self.norm.forward
        vars(self.norm)["forward"] = self._norm_of(plain)
        vars(self.head)["forward"] = self._head_of(self.head.forward)

        def undo() -> None:
            vars(self.norm)["forward"] = plain
            del vars(self.head)["forward"]

        return [undo]

    def _norm_of(self, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def norm(x: Tensor) -> Tensor:
            normed = plain(x)
            if self.ahead is not None and x is self.ahead.out:
                self.ahead.normed = normed
            return normed

        return norm

    def _head_of(self, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def head(x: Tensor) -> Tensor:
            ahead, self.ahead = self.ahead, None
            if ahead is None:
                return plain(x)
            if ahead.normed is not None and torch.equal(x, ahead.normed):
                self.was_used = True
                return ahead.logits.view(*x.shape[:-1], -1)
            self.is_used = self.was_used = False
            return plain(x)

        return head


def find_head(module: nn.Module, layers: Sequence[nn.Module]) -> StackHead | None:
    """Return what follows a module's layers: its only norm outside of them, and its output embeddings, with kernels."""
    inside = {id(part) for layer in layers for part in layer.modules()}
    outside = [(part, part.forward) for part in module.modules() if id(part) not in inside]
    norms = [(part, norm.kernel) for part, norm in outside if isinstance(norm, Norm) and norm.kernel is not None]
    head = getattr(module, "get_output_embeddings", lambda: None)()
    if len(norms) != 1 or not isinstance(head, nn.Module) or "forward" in vars(head):
        return None
    (norm, kernel), linears, vocab = norms[0], kernels_of(head), getattr(head, "out_features", None)
    if len(linears) != 1 or not isinstance(vocab, int):
        return None
    return StackHead(norm, head, HeadParts(kernel, linears[0]), vocab)
