"""Which linears one forward calls, how often, and which of them with the very same input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class LinearCalls:
    """What the hooks saw. Linears are known by their paths, which outlive their replacement by packed ones."""

    counts: dict[str, int] = field(default_factory=dict)  # calls by path; only the linears that are called
    inputs: list[tuple[Tensor, Tensor, list[str]]] = field(default_factory=list)  # tensor, its copy, who was given it

    def note(self, path: str, arguments: tuple[Any, ...]) -> None:
        self.counts[path] = self.counts.get(path, 0) + 1
        given = arguments[0] if len(arguments) == 1 else None
        if isinstance(given, Tensor):
            self._place(given).append(path)

    def _place(self, given: Tensor) -> list[str]:
        """Return the list of those that were given this tensor with these values: it may be written to in between."""
        for tensor, copy, paths in self.inputs:
            if tensor is given and torch.equal(copy, given):
                return paths
        self.inputs.append((given, given.clone(), []))
        return self.inputs[-1][2]

    def siblings(self) -> list[list[str]]:
        """Return groups of two and more children of one parent that share an input and are called once."""
        groups: dict[tuple[int, str], list[str]] = {}
        for number, (_, _, paths) in enumerate(self.inputs):
            for path in paths:
                if self.counts[path] == 1:
                    groups.setdefault((number, path.rpartition(".")[0]), []).append(path)
        return [paths for paths in groups.values() if len(paths) > 1]


@contextmanager
def linear_calls(module: nn.Module) -> Iterator[LinearCalls]:
    """Collect the calls of plain linears while active; their inputs live as long as what is found."""
    found = LinearCalls()

    def hook(path: str) -> Any:
        return lambda _, arguments: found.note(path, arguments)

    linears = [(path, part) for path, part in module.named_modules() if type(part) is nn.Linear]
    handles = [part.register_forward_pre_hook(hook(path)) for path, part in linears]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
