"""Runs requests through an engine in this process and notes when each step ended and what it gave."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from core.contracts import StepStats
from core.engine import Engine
from core.errors import CoreError
from core.outputs import Delta
from core.request import ClientRequest
from core.sampling_params import SamplingParams

Watch = Callable[["Step"], None]
_numbers = itertools.count()


@dataclass(frozen=True)
class Step:
    """One step of the engine."""

    seconds: float
    tokens: int  # that ran
    prefill_tokens: int  # of those, in chunks of prompts
    sampled: int  # new tokens
    contexts: tuple[int, ...]  # of each request that got a token: tokens that the last one saw, itself included

    @property
    def decodes(self) -> bool:
        """True if every request ran one token."""
        return self.prefill_tokens == 0 and self.tokens > 0


@dataclass
class Run:
    """What came of some requests."""

    seconds: float = 0.0  # from the first request to the last token
    output_tokens: int = 0
    first: list[float] = field(default_factory=list)  # seconds to the first token, by request
    gaps: list[float] = field(default_factory=list)  # seconds between two tokens of a request
    steps: list[Step] = field(default_factory=list)


def greedy_params(new: int) -> SamplingParams:
    """Exactly `new` tokens, whatever they say."""
    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)


def run_requests(
    engine: Engine, prompts: Sequence[Sequence[int]], new: int, concurrency: int, watch: Watch | None = None
) -> Run:
    """Answer all prompts with `new` tokens each, `concurrency` at a time; the next one starts when one is done.

    `watch` is called after every step. Raises CoreError if an answer has another length.
    """
    return _Driver(engine, new, watch).run(prompts, concurrency)


class _Driver:
    def __init__(self, engine: Engine, new: int, watch: Watch | None) -> None:
        self.engine, self.params, self.new, self.watch = engine, greedy_params(new), new, watch
        self.found = Run()
        self.added: dict[str, float] = {}  # by request: when it was added
        self.last: dict[str, float] = {}  # when its last token came
        self.lengths: dict[str, int] = {}  # tokens of the prompt and the answer so far

    def run(self, prompts: Sequence[Sequence[int]], concurrency: int) -> Run:
        waiting = list(reversed(prompts))
        self.engine.take_stats()  # from the first call on they are kept
        start = time.perf_counter()
        try:
            while waiting or self.lengths:
                while waiting and len(self.lengths) < concurrency:
                    self._add(waiting.pop())
                self._step()
        finally:
            for request in list(self.lengths):
                self.engine.abort(request)
        self.found.seconds = time.perf_counter() - start
        wanted = len(prompts) * self.new
        if self.found.output_tokens != wanted:
            raise CoreError(f"{len(prompts)} answers of {self.new} tokens were asked for, but {wanted} did not come.")
        return self.found

    def _add(self, prompt: Sequence[int]) -> None:
        request = f"bench-{next(_numbers)}"
        self.engine.add(ClientRequest(request, list(prompt), self.params))
        self.added[request], self.lengths[request] = time.perf_counter(), len(prompt)

    def _step(self) -> None:
        step, deltas = step_once(self.engine, self.lengths)
        now = time.perf_counter()
        for delta in deltas:
            self._take(delta, now)
        self.found.steps.append(step)
        if self.watch is not None:
            self.watch(step)

    def _take(self, delta: Delta, now: float) -> None:
        request = delta.request_id
        if request in self.last:
            self.found.gaps.append(now - self.last[request])
        else:
            self.found.first.append(now - self.added[request])
        self.last[request] = now
        self.found.output_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            del self.lengths[request]


def step_once(engine: Engine, lengths: dict[str, int]) -> tuple[Step, list[Delta]]:
    """Run one step and time it; `lengths` holds the tokens of each request so far, and is brought up to date.

    `engine.take_stats` must have been called once before: only then are they kept.
    """
    start = time.perf_counter()
    deltas = engine.step()
    seconds = time.perf_counter() - start
    contexts = tuple(lengths[delta.request_id] for delta in deltas if delta.token_ids)
    for delta in deltas:
        lengths[delta.request_id] += len(delta.token_ids)
    stats = [one for one in engine.take_stats() if isinstance(one, StepStats)]
    tokens, prefill, sampled = (
        sum(getattr(one, name) for one in stats) for name in ("num_tokens", "num_prefill_tokens", "num_sampled")
    )
    return Step(seconds, tokens, prefill, sampled, contexts), deltas
