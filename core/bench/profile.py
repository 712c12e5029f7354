"""Where a step's time goes: timers around the engine's parts, set while profiling and taken away afterwards.

Times are exclusive: what a part spends inside another part (an MLP in its linears) is the inner one's. Nothing of this
is in the engine itself, so that it costs nothing unless it is asked for.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from core.bench.profile_parts import KERNEL_PARTS, PARTS, Hook, hooks_of
from core.engine import Engine
from core.errors import ConfigError
from core.kernel_contracts import DecoderKernel

TRIES = 20_000


class Profiler:
    """A context in which an engine's parts are timed. Raises ConfigError for a device that is no CPU."""

    def __init__(self, engine: Engine) -> None:
        if engine.info.device != "cpu":
            raise ConfigError(
                f"--profile times the parts of a step on the CPU; {engine.info.device} computes while Python goes on. "
                "Use torch's own profiler there."
            )
        self._hooks = hooks_of(engine)
        self._kept: list[tuple[Hook, bool, Any]] = []  # (hook, whether the owner itself had the attribute, which)
        self._open: list[float] = []  # by open part: seconds of the parts inside it
        self._seconds: dict[str, float] = defaultdict(float)
        self._calls = 0
        self._thread = threading.get_ident()
        self.seconds_per_call = self._cost_of_a_call()

    def __enter__(self) -> Profiler:
        for hook in self._hooks:
            own = vars(hook.owner)
            self._kept.append((hook, hook.name in own, own.get(hook.name)))
            setattr(hook.owner, hook.name, self._timed(hook.part, getattr(hook.owner, hook.name), hook.kernel))
            if hook.kernel is not None:
                hook.kernel.time(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._kept:
            hook, was_own, before = self._kept.pop()
            if hook.kernel is not None:
                hook.kernel.time(False)
            if was_own:
                setattr(hook.owner, hook.name, before)
            else:
                delattr(hook.owner, hook.name)

    def take(self) -> tuple[dict[str, float], int]:
        """Return and forget the seconds by part, and how many calls were timed for them."""
        taken = dict(self._seconds), self._calls
        self._seconds.clear()
        self._calls = 0
        return taken

    def _timed(
        self, part: str, function: Callable[..., Any], kernel: DecoderKernel | None = None
    ) -> Callable[..., Any]:
        clock, opened, seconds, thread, here = (
            time.perf_counter, self._open, self._seconds, threading.get_ident, self._thread,
        )  # fmt: skip

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if thread() != here:
                return function(*args, **kwargs)
            opened.append(0.0)
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                took = clock() - start
                inside = opened.pop() + (0.0 if kernel is None else self._take_parts(kernel))
                seconds[part] += took - inside
                if opened:
                    opened[-1] += took
                self._calls += 1

        return timed

    def _take_parts(self, kernel: DecoderKernel) -> float:
        """Count what a kernel has measured by itself; return the sum."""
        found = kernel.take_times()
        for name, seconds in found.items():
            self._seconds[KERNEL_PARTS[name]] += seconds
        return sum(found.values())

    def _cost_of_a_call(self) -> float:
        """Return the seconds that one timer takes, by timing a function that does nothing."""

        def nothing() -> None:
            return None

        timed = self._timed(PARTS[0], nothing)
        costs = []
        for function in (nothing, timed):
            start = time.perf_counter()
            for _ in range(TRIES):
                function()
            costs.append((time.perf_counter() - start) / TRIES)
        self.take()
        return max(0.0, costs[1] - costs[0])


@dataclass
class Profile:
    """The parts of all steps of one kind, added up."""

    steps: int = 0
    calls: int = 0  # of timers
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    seconds_per_call: float = 0.0  # of a timer
    bounds: dict[str, float] = field(default_factory=dict)  # by part: seconds that the machine needs at least

    def add(self, taken: tuple[dict[str, float], int], bounds: Sequence[tuple[str, float]] = ()) -> None:
        """Add one step."""
        seconds, calls = taken
        self.steps += 1
        self.calls += calls
        for part, value in seconds.items():
            self.seconds[part] += value
        for part, value in bounds:
            self.bounds[part] = self.bounds.get(part, 0.0) + value

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def share(self, part: str) -> float:
        return self.seconds[part] / self.total if self.total else 0.0

    @property
    def overhead(self) -> float:
        """The share of the time that the timers themselves took."""
        return self.calls * self.seconds_per_call / self.total if self.total else 0.0
