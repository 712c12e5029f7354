"""A list of layers that run in one call: whoever goes through it is shown the first alone, as long as that runs all.

A loop over thirty layers that have nothing to do costs a quarter of a millisecond: a slice of a ModuleList is a new
ModuleList, and each layer is called through nn.Module and what transformers puts around its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn


class StackedList(nn.ModuleList):
    """Stands in the place of a ModuleList's class."""

    runs_all: Callable[[], bool]  # by the first layer, in this forward; an attribute of each list

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._shown())

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        if index.indices(len(self)) == (0, len(self), 1):
            return self._shown()
        return nn.ModuleList(list(self._modules.values())[index])  # type: ignore[arg-type]

    def _shown(self) -> Sequence[nn.Module]:
        layers: tuple[Any, ...] = tuple(self._modules.values())
        return layers[:1] if self.runs_all() else layers


def show_first(
    module: nn.Module, layers: Sequence[nn.Module], runs_all: Callable[[], bool]
) -> list[Callable[[], None]]:
    """Do so in the list of a module that holds exactly these layers, if there is one; return how to undo it."""
    for part in module.modules():
        if type(part) is nn.ModuleList and list(part) == list(layers):
            return [_put(part, runs_all)]
    return []


def _put(part: nn.Module, runs_all: Callable[[], bool]) -> Callable[[], None]:
    part.__class__ = StackedList
    vars(part)["runs_all"] = runs_all

    def undo() -> None:
        part.__class__ = nn.ModuleList
        del vars(part)["runs_all"]

    return undo
