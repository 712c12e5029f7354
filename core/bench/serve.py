"""`bench serve`: what clients see of a server, and how much of the offline engine's speed reaches them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from core.bench.client import Target, Traffic, check_openai
from core.bench.numbers import median, quantile
from core.bench.offline import run_requests
from core.bench.prompts import Prompts
from core.bench.server import running_server, wait_until_ready
from core.bench.subject import Bench, Subject, check_fits, opened
from core.bench.throughput import WARM_TOKENS, Progress
from core.config import EngineConfig
from core.errors import ConfigError
from core.plugins import PluginHost

OTHERS_VOCAB = 256  # ids that every model has, for a server that does not say how many its own has


@dataclass(frozen=True)
class ServeLoad:
    """What clients ask of the server."""

    clients: tuple[int, ...]  # at a time
    per_client: int  # requests of each
    request_rate: float | None  # requests a second; None: each client sends its next when the last one is answered
    input_len: int  # tokens
    output_len: int  # tokens
    rounds: int


@dataclass(frozen=True)
class Served:
    """One number of clients: medians over rounds, percentiles over all requests."""

    clients: int
    requests: int
    failed: int
    output_tok_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    offline_tok_s: float  # the same requests, as many at a time, by the engine without HTTP; NaN if not measured


@dataclass(frozen=True)
class ServeReport:
    subject: Subject | None  # None: a server whose model is not opened here
    url: str
    load: ServeLoad
    rows: tuple[Served, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Server:
    """A server that runs already."""

    url: str
    api_key: str | None
    has_model: bool  # the model that it serves is given too, so that the offline engine can be measured beside it


def measure_serve(
    config: EngineConfig, host: PluginHost, load: ServeLoad, server: Server | None, progress: Progress
) -> ServeReport:
    """Without `server`, one is started for `config`. Raises CoreError if it does not come up or answers nothing."""
    check_openai()
    if config.skip_tokenizer_init and server is None:
        raise ConfigError("bench serve times pieces of text, and a server without a tokenizer streams none.")
    with ExitStack() as stack:
        bench = None
        if server is None or server.has_model:
            progress("loading the offline engine")
            bench = stack.enter_context(opened(config, host, max(load.clients)))
            check_fits(bench.engine, load.input_len, load.output_len)
            config = bench.engine.config
        if server is None:
            progress("starting the server")
            server = Server(stack.enter_context(running_server(config)), None, True)
        else:
            wait_until_ready(server.url, limit=30)
        return _Measuring(Target(server.url, server.api_key, load.output_len), bench, load, progress).report()


class _Measuring:
    """Rounds of a server's turn and the engine's, for each number of clients."""

    def __init__(self, target: Target, bench: Bench | None, load: ServeLoad, progress: Progress) -> None:
        self.target, self.bench, self.load, self.progress = target, bench, load, progress
        self.prompts = Prompts(target.vocab_size() or OTHERS_VOCAB) if bench is None else bench.prompts
        self.errors: list[str] = []

    def report(self) -> ServeReport:
        rows = tuple(self._row(count) for count in self.load.clients)
        notes = [f"Failed: {error}" for error in dict.fromkeys(self.errors)]
        if self.bench is None:
            notes.append("Give --model-path too, and the offline engine is measured beside the server.")
        elif self.load.request_rate is not None:
            notes.append("Where requests arrive at a rate, the engine waits for them: no offline engine beside it.")
        subject = None if self.bench is None else self.bench.subject
        return ServeReport(subject, self.target.url, self.load, rows, tuple(notes))

    def _row(self, count: int) -> Served:
        self.progress(f"warming up: {count} clients")
        self._serve([[prompt] for prompt in self._draw(count)])
        traffic, offline = [], []
        for number in range(self.load.rounds):
            self.progress(f"round {number + 1} of {self.load.rounds}: {count} clients")
            shares = [self._draw(self.load.per_client) for _ in range(count)]
            traffic.append(self._serve(shares))
            if self.bench is not None and self.load.request_rate is None:
                offline.append(self._offline(count))
        self.errors += [error for one in traffic for error in one.errors]
        return _summed(count, traffic, offline)

    def _draw(self, count: int) -> list[list[int]]:
        return self.prompts.draw(count, self.load.input_len)

    def _serve(self, shares: Sequence[Sequence[Sequence[int]]]) -> Traffic:
        return self.target.send(shares, self.load.request_rate)

    def _offline(self, count: int) -> float:
        """Return tokens a second for as many requests of the same length, as many at a time."""
        assert self.bench is not None
        run_requests(self.bench.engine, self._draw(count), WARM_TOKENS, count)
        run = run_requests(self.bench.engine, self._draw(count * self.load.per_client), self.load.output_len, count)
        return run.output_tokens / run.seconds


def _summed(count: int, traffic: Sequence[Traffic], offline: Sequence[float]) -> Served:
    first = [seconds for one in traffic for seconds in one.first]
    gaps = [seconds for one in traffic for seconds in one.gaps]
    return Served(
        clients=count,
        requests=len(first),
        failed=sum(len(one.errors) for one in traffic),
        output_tok_s=median([one.output_tokens / one.seconds for one in traffic]),
        ttft_p50_s=quantile(first, 0.5),
        ttft_p99_s=quantile(first, 0.99),
        itl_p50_s=quantile(gaps, 0.5),
        itl_p99_s=quantile(gaps, 0.99),
        offline_tok_s=median(offline) if offline else math.nan,
    )
