"""`bench throughput`: tokens a second of the offline engine by the number of requests at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.bench.numbers import median, quantile
from core.bench.offline import Run, Step, run_requests
from core.bench.profile import Profile, Profiler
from core.bench.profile_parts import ATTENTION, LINEARS
from core.bench.roofline import attention_bound, decode_share, linears_bound, prefill_share
from core.bench.subject import Bench, Subject, check_fits

Progress = Callable[[str], None]
WARM_TOKENS = 2


@dataclass(frozen=True)
class Load:
    """What is asked of the engine."""

    concurrency: tuple[int, ...]  # requests at a time
    input_len: int  # tokens
    output_len: int  # tokens
    rounds: int


@dataclass(frozen=True)
class Throughput:
    """One number of requests at a time: medians over rounds; NaN where nothing of the kind was run."""

    concurrency: int
    output_tok_s: float  # all new tokens over all time
    decode_tok_s: float  # over the steps in which every request runs one token
    prefill_tok_s: float  # over the steps that run prompts
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    decode_share: float  # of the roofline
    prefill_share: float
    spread: float  # highest less lowest round over the median, of output_tok_s


@dataclass(frozen=True)
class ThroughputReport:
    subject: Subject
    load: Load
    rows: tuple[Throughput, ...]
    profiles: dict[str, Profile]  # by what was run, e.g. "decode, 4 at a time"; empty unless asked for


def measure_throughput(bench: Bench, load: Load, profile: bool, progress: Progress) -> ThroughputReport:
    """Rounds go through all numbers in turn, so that a machine that slows down does so for all."""
    check_fits(bench.engine, load.input_len, load.output_len)
    runs: dict[int, list[Run]] = {count: [] for count in load.concurrency}
    for count in load.concurrency:
        progress(f"warming up: {count} at a time")
        run_requests(bench.engine, bench.prompts.draw(count, load.input_len), min(WARM_TOKENS, load.output_len), count)
    for number in range(load.rounds):
        for count, found in runs.items():
            progress(f"round {number + 1} of {load.rounds}: {count} at a time")
            prompts = bench.prompts.draw(count, load.input_len)
            found.append(run_requests(bench.engine, prompts, load.output_len, count))
    profiles = _profiles(bench, load, progress) if profile else {}
    rows = tuple(_row(bench.subject, load, count, found) for count, found in runs.items())
    return ThroughputReport(bench.subject, load, rows, profiles)


def _row(subject: Subject, load: Load, count: int, runs: Sequence[Run]) -> Throughput:
    lengths = [load.input_len] * count
    speeds = [run.output_tokens / run.seconds for run in runs]
    first = [seconds for run in runs for seconds in run.first]
    gaps = [seconds for run in runs for seconds in run.gaps]
    costs, ceilings = subject.costs, subject.ceilings
    return Throughput(
        concurrency=count,
        output_tok_s=median(speeds),
        decode_tok_s=median([tokens_per_second(run.steps, "sampled", True) for run in runs]),
        prefill_tok_s=median([tokens_per_second(run.steps, "tokens", False) for run in runs]),
        ttft_p50_s=quantile(first, 0.5),
        ttft_p99_s=quantile(first, 0.99),
        itl_p50_s=quantile(gaps, 0.5),
        itl_p99_s=quantile(gaps, 0.99),
        decode_share=median([decode_share(run.steps, costs, ceilings) for run in runs]),
        prefill_share=median([prefill_share(run.steps, lengths, costs, ceilings) for run in runs]),
        spread=(max(speeds) - min(speeds)) / median(speeds),
    )


def tokens_per_second(steps: Sequence[Step], name: str, decodes: bool) -> float:
    """Return `tokens` or `sampled` over the time of the steps that decode, or of the others; NaN of none."""
    chosen = [step for step in steps if step.decodes is decodes and step.tokens]
    seconds = sum(step.seconds for step in chosen)
    return sum(getattr(step, name) for step in chosen) / seconds if chosen else float("nan")


# ------------------------------------------------------------------------------------------------ profile


def _profiles(bench: Bench, load: Load, progress: Progress) -> dict[str, Profile]:
    """A further round with the timers on, whose tokens a second count nowhere."""
    found: dict[str, Profile] = {}
    with Profiler(bench.engine) as profiler:
        for count in load.concurrency:
            progress(f"profiling: {count} at a time")
            watch = StepProfiles(profiler, bench.subject, f"{count} at a time")
            run_requests(bench.engine, bench.prompts.draw(count, load.input_len), load.output_len, count, watch)
            found |= watch.profiles
    return found


class StepProfiles:
    """Sorts steps by what they run."""

    def __init__(self, profiler: Profiler, subject: Subject, label: str) -> None:
        self.profiler, self.subject, self.label = profiler, subject, label
        self.profiles: dict[str, Profile] = {}

    def __call__(self, step: Step) -> None:
        kind = f"{'decode' if step.decodes else 'prefill'}, {self.label}"
        if kind not in self.profiles:
            self.profiles[kind] = Profile(seconds_per_call=self.profiler.seconds_per_call)
        self.profiles[kind].add(self.profiler.take(), self._bounds(step))

    def _bounds(self, step: Step) -> list[tuple[str, float]]:
        """Of the steps that decode; what a prefill step's rows attend to is not known outside the engine."""
        if not step.decodes:
            return []
        costs, ceilings = self.subject.costs, self.subject.ceilings
        return [(LINEARS, linears_bound(step, costs, ceilings)), (ATTENTION, attention_bound(step, costs, ceilings))]
