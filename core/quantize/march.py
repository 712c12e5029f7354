"""Runs all calibration samples through a model side by side, each waiting before the same decoder layer.

A sample's forward is the model's own, from embedding to the last layer, in a thread of its own that stops at every
layer until the march goes on. So whatever a model does between its layers (other inputs for every layer, kinds of
masks, layers that share weights) is done as it always is, and no activation but the present layer's is kept.
One thread runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import CoreError


@dataclass(frozen=True)
class Call:
    """The arguments with which a sample's forward calls a module."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, module: nn.Module) -> Tensor:
        """Run a module on copies of the arguments, so that they can be used again; return its first output."""
        out = module(*map(_copied, self.args), **{name: _copied(value) for name, value in self.kwargs.items()})
        first: Tensor = out[0] if isinstance(out, (tuple, list)) else out
        return first


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class March:
    """Use as an iterator of (index of a layer, each sample's call of it), in the order in which the model calls them.

    While an item is held, its layer may be changed; it then runs as it is left. Layers in `passed` run without a stop.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[nn.Module], samples: Sequence[Sequence[int]], passed: set[int]
    ) -> None:
        self.layers = layers
        self.passed = passed
        self.walkers = [_Walker(model, sample) for sample in samples]
        self._now: _Walker | None = None

    def __iter__(self) -> Iterator[tuple[int, list[Call]]]:
        hooks = [
            layer.register_forward_pre_hook(self._stop(n), with_kwargs=True) for n, layer in enumerate(self.layers)
        ]
        try:
            while (index := self._advance()) is not None:
                yield index, [walker.call for walker in self.walkers if walker.call is not None]
                self.passed.add(index)
        finally:
            for hook in hooks:
                hook.remove()
            for walker in self.walkers:
                walker.end()

    def _advance(self) -> int | None:
        """Let every sample run up to its next layer; None when there is none left."""
        if len(self.passed) == len(self.layers):
            return None
        places = set()
        for walker in self.walkers:
            self._now = walker
            places.add(walker.advance())
        self._now = None
        if len(places) > 1:
            raise CoreError(f"Samples are at different layers ({places}), so this model cannot be calibrated.")
        return places.pop() if places else None

    def _stop(self, index: int) -> Any:
        def stop(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            walker = self._now
            if walker is not None and index not in self.passed and walker.is_me():
                walker.wait(index, Call(args, kwargs))

        return stop


class _Ended(BaseException):
    """Unwinds a forward that nobody needs any more; no model's `except Exception` may catch it."""


class _Walker:
    """One sample's forward in a thread that runs only while `advance` waits for it."""

    def __init__(self, model: nn.Module, sample: Sequence[int]) -> None:
        self.call: Call | None = None
        self._place: int | None = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._over = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(model, sample), daemon=True)

    def is_me(self) -> bool:
        return threading.current_thread() is self._thread

    def advance(self) -> int | None:
        """Go on to the next stop and return its layer; None if the forward is through."""
        self.call, self._place = None, None
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self._place

    def wait(self, place: int, call: Call) -> None:
        """Stop here. Called in the walker's own thread."""
        self.call, self._place = call, place
        self._stopped.release()
        self._go.acquire()
        if self._over:
            raise _Ended

    def end(self) -> None:
        self._over = True
        while self._thread.is_alive():
            self._go.release()
            self._thread.join(1)

    def _run(self, model: nn.Module, sample: Sequence[int]) -> None:
        try:
            device = next(model.parameters()).device
            with torch.no_grad():
                model(input_ids=torch.tensor([list(sample)], device=device), use_cache=False)
        except _Ended:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            self._error = error
        finally:
            self._stopped.release()
