"""Hidden states out of a running model: finds the list of decoder layers, and records what each of them puts out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class LayerRecorder:
    """The outputs of a list of layers since `clear`: call after call, each [..., tokens, hidden] float32."""

    names: list[str]
    layers: list[nn.Module]
    calls: list[list[Tensor]] = field(default_factory=list)  # by layer

    def clear(self) -> None:
        self.calls = [[] for _ in self.layers]

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.clear()
        handles = [layer.register_forward_hook(self._hook(index)) for index, layer in enumerate(self.layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int) -> Any:
        def note(layer: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(first, Tensor):  # a copy: whoever comes after may add in place
                self.calls[index].append(first.detach().to("cpu", torch.float32, copy=True))

        return note

    def rows(self, tokens: int) -> list[Tensor] | None:
        """Return each layer's [tokens, hidden], if it ran that many in one flat row; None if any did not.

        Where a layer ran more than once (weights that are shared between depths), its last run counts.
        """
        found = []
        for calls in self.calls:
            flat = [row for call in calls if (row := _flat(call)) is not None and len(row) == tokens]
            if not flat:
                return None
            found.append(flat[-1])
        return found


def _flat(output: Tensor) -> Tensor | None:
    """[tokens, hidden] or [1, tokens, hidden]; a batch of several rows has no order that we could know."""
    if output.dim() == 3 and output.shape[0] == 1:
        return output[0]
    return output if output.dim() == 2 else None


def decoder_layers(model: Any, count: int | None = None) -> LayerRecorder | None:
    """Find the decoder's layers: the longest ModuleList that lies in no other one; of `count` entries, if given.

    `model` is a module, or an object that holds one, at most two attributes deep.
    """
    found: list[tuple[str, nn.ModuleList]] = []
    for module in modules_of(model):
        found += _outermost(module, "")
    if count is not None:
        found = [(name, layers) for name, layers in found if len(layers) == count]
    if not found:
        return None
    name, layers = max(found, key=lambda one: len(one[1]))
    return LayerRecorder([f"{name}.{index}" for index in range(len(layers))], list(layers))


def modules_of(model: Any, depth: int = 2) -> Sequence[nn.Module]:
    """Return the modules that an object is or holds."""
    if isinstance(model, nn.Module):
        return [model]
    if depth == 0 or not hasattr(model, "__dict__"):
        return []
    return [module for value in vars(model).values() for module in modules_of(value, depth - 1)]


def _outermost(module: nn.Module, path: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """Experts, say, are lists within the list of layers, and may be longer."""
    for name, child in module.named_children():
        where = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            yield where, child
        else:
            yield from _outermost(child, where)
