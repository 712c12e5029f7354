"""State that a model keeps in its modules instead of its cache, so that requests would mix. Found by watching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ModuleState:
    """Takes such state out of the modules and puts it back, request by request."""

    def __init__(self, module: nn.Module) -> None:
        self.modules = dict(module.named_modules())
        self.places: list[tuple[str, str]] = []  # (module path, attribute)
        self.fresh: dict[str, Any] = {}  # their values in a model that has not run

    def learn(self, forward: Callable[[], Any]) -> None:
        """Run a forward and note every tensor attribute that it changes; a parameter never counts."""
        before = self._all()
        with torch.inference_mode():
            forward()
        after = self._all()
        changed = [place for place in after if _differs(before.get(place), after[place])]
        ropes = self._growing_ropes()
        self.places = [*(place for place in changed if place not in ropes), *ropes]
        self.fresh = {_key(place): before.get(place) for place in changed} | {
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
            for attribute, value in (*vars(module).items(), *module._buffers.items()):
                if isinstance(value, Tensor) or (value is None and not attribute.startswith("_")):
                    found[name, attribute] = value.clone() if isinstance(value, Tensor) else None
        return found

    def reset(self) -> None:
        """Make the model forget: the next forward begins a new text."""
        self.put(self.fresh)

    def take(self) -> dict[str, Any]:
        """Return the state as it stands."""
        return {_key((name, attribute)): getattr(self.modules[name], attribute) for name, attribute in self.places}

    def put(self, state: dict[str, Any]) -> None:
        for name, attribute in self.places:
            value = state[_key((name, attribute))]
            setattr(self.modules[name], attribute, value.clone() if isinstance(value, Tensor) else value)


def _key(place: tuple[str, str]) -> str:
    return f"{place[0]}:{place[1]}"


def _differs(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return before.shape != after.shape or not torch.equal(before, after)
    return before is not after
