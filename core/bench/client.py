"""Clients that stream completions from a server with the `openai` package, and note when each piece came."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from core.errors import ConfigError, CoreError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

TIMEOUT_S = 600.0  # for one request


@dataclass
class Traffic:
    """What came back."""

    seconds: float = 0.0  # from the first request to the last piece
    output_tokens: int = 0  # as the server counts them
    first: list[float] = field(default_factory=list)  # seconds to the first piece, by request
    gaps: list[float] = field(default_factory=list)  # seconds between two pieces of a request
    errors: list[str] = field(default_factory=list)


def check_openai() -> None:
    """Raise ConfigError, naming the extra, if the client is not installed."""
    try:
        import openai  # noqa: F401
    except ImportError:
        raise ConfigError("bench serve needs the openai client. Install it: pip install 'core-serve[bench]'") from None


@dataclass(frozen=True)
class Target:
    """A server, and what every request asks of it."""

    url: str
    api_key: str | None
    output_len: int

    def send(self, shares: Sequence[Sequence[Sequence[int]]], rate: float | None, seed: int = 0) -> Traffic:
        """Let one client work through each share of the prompts, one request after the other.

        With a `rate` (requests a second), requests arrive at random times instead (a Poisson process), whichever client
        they belong to. Raises CoreError if no request came through.
        """
        return asyncio.run(self._send(shares, rate, random.Random(seed)))

    def vocab_size(self) -> int | None:
        """Return what the server says of its model; None if it does not say."""
        from openai import OpenAI

        with OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key or "none", max_retries=0) as client:
            size = getattr(client.models.list().data[0], "vocab_size", None)
        return size if isinstance(size, int) else None

    async def _send(
        self, shares: Sequence[Sequence[Sequence[int]]], rate: float | None, draw: random.Random
    ) -> Traffic:
        from openai import AsyncOpenAI

        found = Traffic()
        async with AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=self.api_key or "none", timeout=TIMEOUT_S, max_retries=0
        ) as client:
            model = (await client.models.list()).data[0].id
            start = time.perf_counter()
            if rate is None:
                jobs = [self._one_by_one(client, model, share, found) for share in shares]
            else:
                prompts = [prompt for share in shares for prompt in share]
                jobs = [self._arriving(client, model, prompts, rate, draw, found)]
            await asyncio.gather(*jobs)
            found.seconds = time.perf_counter() - start
        if not found.first:
            why = found.errors[0] if found.errors else "it streamed no text"
            raise CoreError(f"No request to {self.url} came through: {why}")
        return found

    async def _one_by_one(
        self, client: AsyncOpenAI, model: str, prompts: Sequence[Sequence[int]], found: Traffic
    ) -> None:
        for prompt in prompts:
            await self._stream(client, model, prompt, found)

    async def _arriving(
        self, client: AsyncOpenAI, model: str, prompts: Sequence[Sequence[int]], rate: float, draw: random.Random,
        found: Traffic,
    ) -> None:  # fmt: skip
        async with asyncio.TaskGroup() as group:
            for prompt in prompts:
                group.create_task(self._stream(client, model, prompt, found))
                await asyncio.sleep(draw.expovariate(rate))

    async def _stream(self, client: AsyncOpenAI, model: str, prompt: Sequence[int], found: Traffic) -> None:
        """An error of one request is noted, and the others go on."""
        from openai import OpenAIError

        last = start = time.perf_counter()
        pieces = 0
        try:
            stream = await client.completions.create(
                model=model,
                prompt=list(prompt),
                max_tokens=self.output_len,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            async for chunk in stream:
                if chunk.choices and (chunk.choices[0].text or chunk.choices[0].finish_reason is None):
                    now = time.perf_counter()
                    (found.gaps if pieces else found.first).append(now - (last if pieces else start))
                    last, pieces = now, pieces + 1
                if chunk.usage is not None:
                    found.output_tokens += chunk.usage.completion_tokens
        except OpenAIError as error:
            found.errors.append(f"{type(error).__name__}: {error}")
