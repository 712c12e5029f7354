"""Prometheus metrics of one server, fed from what the engine reports and from the deltas that pass by."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from core.contracts import RequestRecord, StepStats
from core.outputs import Delta

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)  # seconds
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # seconds


class Metrics:
    """One registry. A sample is one of a request's n; times are in seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._num_drafted, self._num_accepted = 0, 0
        self._last_token: dict[str, dict[int, float]] = {}  # request id -> sample -> when its last token came
        self._make_gauges()
        self._make_counters()
        self._make_histograms()

    def _make_gauges(self) -> None:
        self.ready = Gauge("core_serve_engine_ready", "1 if the engine answers.", registry=self.registry)
        self.running = Gauge("core_serve_requests_running", "Samples being computed.", registry=self.registry)
        self.waiting = Gauge("core_serve_requests_waiting", "Samples in the queue.", registry=self.registry)
        self.free_blocks = Gauge("core_serve_blocks_free", "KV blocks that can be taken.", registry=self.registry)
        self.blocks = Gauge("core_serve_blocks_total", "KV blocks.", registry=self.registry)
        self.acceptance = Gauge(
            "core_serve_spec_decode_acceptance_rate",
            "Guessed tokens that were the model's own, as a share of all guessed since the start.",
            registry=self.registry,
        )

    def _make_counters(self) -> None:
        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"core_serve_{name}", text, labels, registry=self.registry)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that gave a token.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.cache_queried = counter("prefix_cache_queried_tokens", "Prompt tokens looked up in the prefix cache.")
        self.cache_hits = counter("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache.")
        self.preemptions = counter("preemptions", "Samples put back into the queue for want of blocks.")
        self.finished = counter("requests_finished", "Samples that ended, by reason.", ["reason"])
        self.aborted = counter("requests_aborted", "Samples that were aborted.")
        self.steps = counter("steps", "Engine steps.")
        self.deaths = counter("engine_deaths", "Engine processes that died.")
        self.drafted = counter("spec_decode_draft_tokens", "Tokens guessed by speculation, and run.")
        self.accepted = counter("spec_decode_accepted_tokens", "Guessed tokens that were the model's own.")

    def _make_histograms(self) -> None:
        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"core_serve_{name}_seconds", text, buckets=buckets, registry=self.registry)

        self.ttft = histogram("time_to_first_token", "From arrival to the first token.", LONG)
        self.inter_token = histogram("inter_token", "Between two tokens of a sample.", SHORT)
        self.total = histogram("request", "From arrival to the end.", LONG)
        self.queue = histogram("queue_time", "From arrival to the first step.", LONG)
        self.step_time = histogram("step", "One engine step.", SHORT)

    # ------------------------------------------------------------------------------------------ feeding

    def observe(self, event: StepStats | RequestRecord) -> None:
        """Take one report of the engine."""
        if isinstance(event, StepStats):
            self._on_step(event)
        else:
            self._on_finished(event)

    def _on_step(self, stats: StepStats) -> None:
        self.running.set(stats.num_running)
        self.waiting.set(stats.num_waiting)
        self.free_blocks.set(stats.free_blocks)
        self.blocks.set(stats.num_blocks)
        self.preemptions.inc(stats.num_preempted)
        self.steps.inc()
        self.step_time.observe(stats.seconds)
        if stats.num_drafted:
            self._on_drafts(stats.num_drafted, stats.num_accepted)

    def _on_drafts(self, drafted: int, accepted: int) -> None:
        self.drafted.inc(drafted)
        self.accepted.inc(accepted)
        self._num_drafted += drafted
        self._num_accepted += accepted
        self.acceptance.set(self._num_accepted / self._num_drafted)

    def _on_finished(self, record: RequestRecord) -> None:
        self.finished.labels(record.finish_reason).inc()
        if record.finish_reason == "abort":
            self.aborted.inc()
        if record.ttft_s is not None:
            self.ttft.observe(record.ttft_s)
            self.cache_queried.inc(record.num_prompt_tokens)
            self.cache_hits.inc(record.num_cached_tokens)
        self.total.observe(record.total_s)
        self.queue.observe(record.queue_s)

    def on_deltas(self, deltas: Sequence[Delta], now: float) -> None:
        """Count the tokens of one step that arrived at `now`."""
        for delta in deltas:
            if delta.request_id not in self._last_token:
                self._last_token[delta.request_id] = {}
                self.prompt_tokens.inc(delta.num_prompt_tokens)
            if delta.token_ids:
                self.generation_tokens.inc(len(delta.token_ids))
                self._observe_gap(delta, now)

    def _observe_gap(self, delta: Delta, now: float) -> None:
        samples = self._last_token[delta.request_id]
        before = samples.get(delta.index)
        samples[delta.index] = now
        if before is not None:
            for _ in delta.token_ids:
                self.inter_token.observe((now - before) / len(delta.token_ids))

    def forget(self, request_id: str) -> None:
        """The request is over: no more deltas of it will be counted."""
        self._last_token.pop(request_id, None)

    def on_idle(self) -> None:
        """No request is left in the engine, or no engine is left."""
        self.running.set(0)
        self.waiting.set(0)

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)
