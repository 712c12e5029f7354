"""What the parts of a module are given in one forward: which linears share an input, what blocks make of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from core_hf_fallback.alike import Alike

T = TypeVar("T")


@dataclass(frozen=True)
class BlockCall:
    """One call of a module that holds others."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    of_another: bool = False  # recorded in a block that is alike: this one's weights would give other results

    def argument(self, name: str) -> Any:
        """Return a keyword argument, or the only positional one: what a block works on comes first."""
        return self.args[0] if name not in self.kwargs and len(self.args) == 1 else self.kwargs.get(name)


@dataclass
class LinearCalls:
    """What the hooks saw. Modules are known by their paths, which outlive the replacement of linears by packed ones."""

    blocks: dict[str, list[BlockCall]] = field(default_factory=dict)  # by path

    counts: dict[str, int] = field(default_factory=dict)  # calls by path; only the linears that are called
    inputs: list[tuple[Tensor, Tensor, list[str]]] = field(default_factory=list)  # tensor, its copy, who was given it
    choices: dict[str, str] = field(default_factory=dict)  # by path: which of several formulas a block was found to be

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

    def carry_over(self, alike: Alike) -> None:
        """Note for every layer that was let through what was seen of the one that it is like."""
        others = {path: [replace(call, of_another=True) for call in found] for path, found in self.blocks.items()}
        through = {path: others[path] for path, _ in alike.pairs() if path in others}  # these were called themselves
        self.blocks |= _carried_over(others, alike) | through
        self.counts |= _carried_over(self.counts, alike)
        self.choices |= _carried_over(self.choices, alike)
        for tensor, copy, paths in list(self.inputs):
            for layer, first in alike.pairs():
                own = [layer + path.removeprefix(first) for path in paths if path.startswith(f"{first}.")]
                self.inputs += [(tensor, copy, own)] if own else []

    def siblings(self) -> list[list[str]]:
        """Return groups of two and more children of one parent that share an input and are called once."""
        groups: dict[tuple[int, str], list[str]] = {}
        for number, (_, _, paths) in enumerate(self.inputs):
            for path in paths:
                if self.counts[path] == 1:
                    groups.setdefault((number, path.rpartition(".")[0]), []).append(path)
        return [paths for paths in groups.values() if len(paths) > 1]


def _carried_over(by_path: dict[str, T], alike: Alike) -> dict[str, T]:
    return {own: value for path, value in by_path.items() for own in alike.translated(path)}


@contextmanager
def linear_calls(module: nn.Module) -> Iterator[LinearCalls]:
    """Collect the calls of plain linears while active; their inputs live as long as what is found."""
    found = LinearCalls()

    def hook(path: str) -> Any:
        return lambda _, arguments: found.note(path, arguments)

    def block_hook(path: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found.blocks.setdefault(path, []).append(BlockCall(args, kwargs, output))

        return note

    linears = [(path, part) for path, part in module.named_modules() if type(part) is nn.Linear]
    handles = [part.register_forward_pre_hook(hook(path)) for path, part in linears]
    blocks = [(path, part) for path, part in module.named_modules() if path and _is_block(part)]
    handles += [part.register_forward_hook(block_hook(path), with_kwargs=True) for path, part in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_block(part: nn.Module) -> bool:
    """True for what holds others, or a stack of weights as if it did: experts."""
    return bool(part._modules) or any(weight is not None and weight.dim() == 3 for weight in part._parameters.values())
