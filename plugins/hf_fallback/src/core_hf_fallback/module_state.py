"""State that a model keeps in its modules instead of its cache, so that requests would mix. Found by watching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

NUMBERS = (int, float, str)  # a bool is an int
OF_TORCH = frozenset(vars(nn.Module()))  # what nn.Module itself keeps in every module


class Absent:
    """Stands for an attribute that is not there yet."""

    __slots__ = ()


ABSENT = Absent()


class ModuleState:
    """Takes such state out of the modules and puts it back, request by request.

    State is a tensor, a number or a text in an attribute, None where one of these will be, lists, tuples and dicts of
    them, and which module stands in a place.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules = dict(module.named_modules())
        self.places: list[tuple[str, str]] = []  # (module path, attribute)
        self.fresh: dict[str, Any] = {}  # their values in a model that has not run

    def learn(self, forward: Callable[[], Any]) -> None:
        """Run a forward and note every such attribute that it changes; a parameter never counts."""
        before = self._all()
        with torch.inference_mode():
            forward()
        after = self._all()
        changed = [place for place in after if _differs(before.get(place, ABSENT), after[place])]
        ropes = self._growing_ropes()
        self.places = [*(place for place in changed if place not in ropes), *ropes]
        self.fresh = {_key(place): before.get(place, ABSENT) for place in changed} | {
            _key((name, attribute)): getattr(self.modules[name], attribute) for name, attribute in ropes
        }
        self.reset()

    def _growing_ropes(self) -> list[tuple[str, str]]:
        """A dynamic rope keeps the frequencies of the longest text so far; a few tokens do not show that."""
        found = []
        for name, module in self.modules.items():
            kinds = getattr(module, "rope_type", None)
            if "dynamic" in (kinds.values() if isinstance(kinds, dict) else [kinds]):
                attributes = [*vars(module), *module._buffers]
                found += [(name, one) for one in attributes if one.endswith(("inv_freq", "max_seq_len_cached"))]
        return found

    def _all(self) -> dict[tuple[str, str], Any]:
        found = {}
        for name, module in self.modules.items():
            for attribute, value in _attributes(module):
                if _is_state(value) and not (value is None and attribute.startswith("_")):
                    found[name, attribute] = _own(value)
            found |= {(name, attribute): child for attribute, child in module._modules.items()}
        return found

    def reset(self) -> None:
        """Make the model forget: the next forward begins a new text."""
        self.put(self.fresh)

    def take(self) -> dict[str, Any]:
        """Return the state as it stands."""
        return {_key(place): getattr(self.modules[place[0]], place[1], ABSENT) for place in self.places}

    def put(self, state: dict[str, Any]) -> None:
        for name, attribute in self.places:
            value = state[_key((name, attribute))]
            if value is not ABSENT:
                setattr(self.modules[name], attribute, _own(value))
            elif hasattr(self.modules[name], attribute):
                delattr(self.modules[name], attribute)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from ((name, value) for name, value in vars(module).items() if name not in OF_TORCH)
    yield from module._buffers.items()


def _is_state(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(_is_state, value))
    if isinstance(value, dict):
        return type(value) is dict and all(map(_is_state, value.values()))
    if isinstance(value, Tensor):
        return not value.is_mkldnn  # a weight that was packed
    return value is None or isinstance(value, NUMBERS)


def _own(value: Any) -> Any:
    """A copy that a model may write into without changing the one that is kept."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_own, value))
    return {key: _own(one) for key, one in value.items()} if isinstance(value, dict) else value


def _key(place: tuple[str, str]) -> str:
    return f"{place[0]}:{place[1]}"


def _differs(before: Any, after: Any) -> bool:
    if type(before) is not type(after):
        return True
    if isinstance(before, Tensor):
        return before.shape != after.shape or not torch.equal(before, after)
    if isinstance(before, (list, tuple)):
        return len(before) != len(after) or any(map(_differs, before, after))
    if isinstance(before, nn.Module):
        return before is not after
    if isinstance(before, dict):
        return before.keys() != after.keys() or any(_differs(before[key], after[key]) for key in before)
    return bool(before != after)
