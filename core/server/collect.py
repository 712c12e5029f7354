"""Deltas put together: whole samples for an answer in one piece, and the count of tokens for `usage`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from core.outputs import Delta, TokenLogprobs
from core.request import ClientRequest
from core.server.requests import RequestStream


@dataclass
class Collected:
    """One sample of one request, as far as it has come."""

    request: ClientRequest
    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def take(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.num_cached = max(self.num_cached, delta.num_cached_tokens)
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_reason = delta.stop_reason if delta.stop_reason is not None else self.stop_reason


class Collector:
    """All samples of a stream, in the order of its requests."""

    def __init__(self, requests: Sequence[ClientRequest]) -> None:
        self.samples = [Collected(request, index) for request in requests for index in range(request.params.n)]
        self._by_key = {(sample.request.id, sample.index): sample for sample in self.samples}

    def take(self, delta: Delta) -> Collected:
        """Add a delta to its sample, and return the sample."""
        sample = self._by_key[delta.request_id, delta.index]
        sample.take(delta)
        return sample


async def collect(stream: RequestStream) -> list[Collected]:
    """Read a stream to its end. Raises what it failed with."""
    collector = Collector(stream.requests)
    while batch := await stream.next_batch():
        for delta in batch:
            collector.take(delta)
    for sample in collector.samples:  # a request's prompt logprobs come once, with whichever sample was first
        first = next(other for other in collector.samples if other.request is sample.request)
        sample.prompt_logprobs = sample.prompt_logprobs or first.prompt_logprobs
    return collector.samples


class Usage:
    """Tokens of all requests of one body; a prompt counts once, whatever its n."""

    def __init__(self, requests: Sequence[ClientRequest]) -> None:
        self.num_prompt = sum(len(request.prompt_ids) for request in requests)
        self.num_output = 0
        self._cached: dict[str, int] = {}

    def take(self, delta: Delta) -> None:
        self.num_output += len(delta.token_ids)
        if delta.num_cached_tokens > self._cached.get(delta.request_id, 0):
            self._cached[delta.request_id] = delta.num_cached_tokens

    def take_all(self, samples: Sequence[Collected]) -> None:
        self.num_output = sum(len(sample.token_ids) for sample in samples)
        for sample in samples:
            self._cached[sample.request.id] = max(sample.num_cached, self._cached.get(sample.request.id, 0))

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_output,
            "total_tokens": self.num_prompt + self.num_output,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }
