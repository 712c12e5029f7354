"""Which layers of a model are alike, so that one of each kind shows what all of them do.

Two layers are alike if they are built of the same classes with the same shapes and the same settings: all that stands
in their attributes, and every list of the config that has an entry a layer. Of a large model the probe runs the first
layer of each kind; the others let their input through. What was found out is then carried over to those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core_hf_fallback.module_state import OF_TORCH

MANY = 6  # layers; of fewer all are run
LARGE = 1 << 30  # bytes of weights in layers; of less all are run
PLAIN = (int, float, str, type(None), torch.dtype, torch.device, torch.Size, type)
Facts = tuple[Any, ...]


class NotAlike(Exception):
    """Why the layers that are let through cannot be."""


@dataclass(frozen=True)
class Alike:
    """The layers of one stack, and for each the first of its kind."""

    path: str  # of the stack, a ModuleList
    like: tuple[int, ...]  # by layer: the one that it is like; itself for the first of a kind

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield (path of a layer, path of the one that is run in its place)."""
        for index, first in enumerate(self.like):
            if index != first:
                yield f"{self.path}.{index}", f"{self.path}.{first}"

    def translated(self, path: str) -> Iterator[str]:
        """Yield the paths of the parts that are like the one at `path`."""
        for layer, first in self.pairs():
            if path == first or path.startswith(f"{first}."):
                yield layer + path[len(first) :]

    @contextmanager
    def others_let_through(self, module: nn.Module, count: Callable[[], int] = lambda: 0) -> Iterator[None]:
        """While active, only the first layer of each kind runs. Raises NotAlike if a layer changes `count`.

        `count` is of something that is learned from whole forwards: layers that are let through would not be seen.
        """
        shown: dict[str, Any] = {}
        handles: list[Any] = []
        for first in {f"{self.path}.{index}" for index in self.like}:
            layer = module.get_submodule(first)
            handles += _watched(layer, first, shown, count)
        for path, first in self.pairs():
            module.get_submodule(path).__dict__["forward"] = _through(first, shown)
        try:
            yield
        finally:
            for path, _ in self.pairs():
                del module.get_submodule(path).__dict__["forward"]
            for handle in handles:
                handle.remove()


def _watched(layer: nn.Module, path: str, shown: dict[str, Any], count: Callable[[], int]) -> list[Any]:
    before: list[int] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        shown[path] = output
        if count() != before.pop():
            raise NotAlike(f"{path} does what is learned from whole forwards")

    return [
        layer.register_forward_pre_hook(lambda *_: before.append(count())),
        layer.register_forward_hook(note),
    ]


def _through(first: str, shown: dict[str, Any]) -> Callable[..., Any]:
    """Return a forward that gives its first argument in the form of what the layer at `first` gave."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("hidden_states")
        like = shown.get(first)
        parts = like if isinstance(like, tuple) else (like,)
        if not isinstance(given, Tensor) or not isinstance(parts[0], Tensor) or parts[0].shape != given.shape:
            raise NotAlike(f"{first} does not give one tensor for another of its shape")
        return (given, *parts[1:]) if isinstance(like, tuple) else given

    return forward


def find_alike(module: nn.Module, configs: Sequence[Any]) -> Alike | None:
    """Find the largest stack of layers and who is like whom; None where running fewer would gain little."""
    stacks = [
        (path, part) for path, part in module.named_modules() if type(part) is nn.ModuleList and len(part) >= MANY
    ]
    if not stacks:
        return None
    path, stack = max(stacks, key=lambda pair: _bytes(pair[1]))
    if _bytes(stack) < LARGE:
        return None
    kinds: dict[Facts, int] = {}
    facts = _facts_of_all(stack, configs, _in_several_places(module))
    like = tuple(kinds.setdefault(one, index) for index, one in enumerate(facts))
    return Alike(path, like) if len(kinds) * 2 <= len(like) else None


def _bytes(part: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in part.parameters())


def _in_several_places(module: nn.Module) -> set[int]:
    places = Counter(id(weight) for _, weight in module.named_parameters(remove_duplicate=False))
    return {one for one, count in places.items() if count > 1}


def _facts_of_all(stack: nn.ModuleList, configs: Sequence[Any], shared: set[int]) -> list[Facts]:
    layers = [dict(_facts(layer, shared)) for layer in stack]
    numbers = set.intersection(
        *({key for key, fact in facts.items() if fact == (int, index)} for index, facts in enumerate(layers))
    )  # attributes that hold the layer's own number
    return [
        (
            tuple((key, fact) for key, fact in facts.items() if key not in numbers),
            tuple(repr(values[index]) for config in configs for values in _a_layer_each(config, len(stack))),
        )
        for index, facts in enumerate(layers)
    ]


def _a_layer_each(config: Any, count: int) -> list[Sequence[Any]]:
    return [value for value in vars(config).values() if isinstance(value, (list, tuple)) and len(value) == count]


def _facts(layer: nn.Module, shared: set[int]) -> Iterator[tuple[tuple[str, str], Any]]:
    """Yield what is known of a layer and of all its parts, by path and name. Whatever is not understood is unlike."""
    for path, part in layer.named_modules():
        yield (path, ""), type(part)
        for name, weight in part._parameters.items():
            own = None if weight is None or id(weight) not in shared else id(weight)
            yield (path, name), None if weight is None else (type(weight), weight.shape, weight.dtype, own)
        for name, buffer in part._buffers.items():
            yield (path, name), None if buffer is None else _fact(buffer)
        for name, value in vars(part).items():
            if name not in OF_TORCH:
                yield (path, name), _fact(value)


def _fact(value: Any) -> Any:
    """What can be compared of a value: for objects of which nothing is known, who they are."""
    if isinstance(value, Tensor):
        return (Tensor, value.shape, value.dtype)
    if isinstance(value, PLAIN):
        return (type(value), value)
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(map(_fact, value)))
    if isinstance(value, dict):
        return (dict, tuple((repr(key), _fact(one)) for key, one in value.items()))
    if isinstance(value, partial):
        return (partial, _fact(value.func), _fact(value.args), _fact(value.keywords))
    return (object, id(getattr(value, "__func__", value)))
