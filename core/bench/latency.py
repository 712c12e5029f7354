"""`bench latency`: the time of one step by the context of one request, and by the number of requests."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from core.bench.numbers import Line, fit, median, quantile
from core.bench.offline import Step, Watch, greedy_params, step_once
from core.bench.profile import Profile, Profiler
from core.bench.roofline import decode_bound
from core.bench.subject import Bench, Subject
from core.bench.throughput import Progress, StepProfiles
from core.errors import ConfigError
from core.request import ClientRequest

WARM_STEPS = 2  # a step of a new shape takes longer the first time


@dataclass(frozen=True)
class Sweep:
    """What is measured."""

    contexts: tuple[int, ...]  # tokens, with one request
    batches: tuple[int, ...]  # requests, with the first context
    steps: int  # timed steps of each


@dataclass(frozen=True)
class Latency:
    """One batch at one context."""

    batch: int
    context: int  # tokens of each request at the last timed step
    first_token_s: float  # from the first request to the last one's first token
    step_s: float  # median
    step_p99_s: float
    bound_s: float  # what the machine needs at least for such a step


@dataclass(frozen=True)
class LatencyReport:
    subject: Subject
    sweep: Sweep
    by_context: tuple[Latency, ...]
    by_batch: tuple[Latency, ...]
    left_out: tuple[str, ...]  # what does not fit the model or the K/V memory, a sentence each
    profiles: dict[str, Profile]

    @property
    def context_line(self) -> Line | None:
        """Seconds a step by tokens of context."""
        return fit([row.context for row in self.by_context], [row.step_s for row in self.by_context])

    @property
    def batch_line(self) -> Line | None:
        """Seconds a step by requests."""
        return fit([row.batch for row in self.by_batch], [row.step_s for row in self.by_batch])


def measure_latency(bench: Bench, sweep: Sweep, profile: bool, progress: Progress) -> LatencyReport:
    """Raises ConfigError if nothing fits."""
    left_out: list[str] = []
    rows: dict[tuple[int, int], Latency] = {}
    points = [(1, context) for context in sweep.contexts] + [(batch, sweep.contexts[0]) for batch in sweep.batches]
    for batch, context in dict.fromkeys(points):
        reason = _too_large(bench, sweep, batch, context)
        if reason is None:
            progress(f"{batch} at a time, context {context}")
            rows[batch, context] = _measure(bench, batch, context, sweep.steps)
        else:
            left_out.append(reason)
    if not rows:
        raise ConfigError(" ".join(left_out))
    first = sweep.contexts[0]
    by_context = [rows[1, context] for context in sweep.contexts if (1, context) in rows]
    by_batch = [rows[batch, first] for batch in sweep.batches if (batch, first) in rows]
    profiles = _profiles(bench, [*by_context, *by_batch], sweep.steps, progress) if profile else {}
    return LatencyReport(bench.subject, sweep, tuple(by_context), tuple(by_batch), tuple(left_out), profiles)


def _too_large(bench: Bench, sweep: Sweep, batch: int, context: int) -> str | None:
    info, extra = bench.engine.info, _extra_tokens(bench, batch, context, sweep.steps)
    if context > info.max_model_len:
        return f"A context of {context} is longer than the model's {info.max_model_len}."
    if context <= extra:
        return f"A context of {context} is too short for {sweep.steps} steps of {batch} requests; give less --steps."
    blocks = batch * math.ceil(context / info.block_size)
    if blocks > info.num_blocks:
        return f"{batch} requests of {context} tokens need {blocks} K/V blocks of {info.num_blocks}: --kv-cache-memory."
    return None


def _extra_tokens(bench: Bench, batch: int, context: int, steps: int) -> int:
    """Return how many tokens the first request may get until the last one's steps are timed."""
    budget = max(1, bench.engine.config.max_num_batched_tokens - batch)  # requests that have begun decode meanwhile
    return math.ceil(batch * context / budget) + WARM_STEPS + steps + 1


def _measure(bench: Bench, batch: int, context: int, steps: int, watch: Watch | None = None) -> Latency:
    """Run prompts to their first tokens, then time steps in which all of them decode."""
    engine, extra = bench.engine, _extra_tokens(bench, batch, context, steps)
    lengths: dict[str, int] = {}
    timed: list[Step] = []
    engine.take_stats()
    start = time.perf_counter()
    try:
        for number, prompt in enumerate(bench.prompts.draw(batch, context - extra)):
            lengths[f"latency-{number}"] = len(prompt)
            engine.add(ClientRequest(f"latency-{number}", prompt, greedy_params(extra)))
        begun: set[str] = set()
        while len(begun) < batch:
            step, deltas = step_once(engine, lengths)
            begun |= {delta.request_id for delta in deltas}
        first = time.perf_counter() - start
        for number in range(WARM_STEPS + steps):
            step, _ = step_once(engine, lengths)
            timed += [step] if number >= WARM_STEPS else []
            if watch is not None:
                watch(step)
    finally:
        for request in lengths:
            engine.abort(request)
    return _row(bench.subject, batch, context, first, timed)


def _row(subject: Subject, batch: int, context: int, first: float, timed: Sequence[Step]) -> Latency:
    seconds = [step.seconds for step in timed]
    bounds = [decode_bound(step, subject.costs, subject.ceilings) for step in timed]
    return Latency(batch, context, first, median(seconds), quantile(seconds, 0.99), median(bounds))


def _profiles(bench: Bench, rows: Sequence[Latency], steps: int, progress: Progress) -> dict[str, Profile]:
    """The ends of both sweeps once more, with the timers on."""
    ends = {(row.batch, row.context) for row in (rows[0], *rows)}
    chosen = sorted({min(ends), max(ends), max(ends, key=lambda end: end[1])})
    found: dict[str, Profile] = {}
    with Profiler(bench.engine) as profiler:
        for batch, context in chosen:
            progress(f"profiling: {batch} at a time, context {context}")
            watch = StepProfiles(profiler, bench.subject, f"{batch} at a time, context {context}")
            _measure(bench, batch, context, steps, _after_clearing(profiler, watch))
            found |= watch.profiles
    return found


def _after_clearing(profiler: Profiler, watch: StepProfiles) -> Watch:
    """Drop what the timers saw before the first watched step: the prompts."""
    seen = 0

    def watched(step: Step) -> None:
        nonlocal seen
        seen += 1
        if seen <= WARM_STEPS:
            profiler.take()
        else:
            watch(step)

    return watched
