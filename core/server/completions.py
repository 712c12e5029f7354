"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from core.engine_info import EngineInfo
from core.errors import InvalidParameter
from core.outputs import Delta, TokenLogprobs
from core.request import ClientRequest
from core.sampling_params import SamplingParams
from core.server.client import EngineClient
from core.server.codec import Codec
from core.server.collect import Collected, Usage
from core.server.logprobs import TextLogprobs, join, prompt_entries
from core.server.openai import CompletionRequest, check_common
from core.server.params import make_params
from core.server.prompts import prompt_ids, split_prompts
from core.server.schema import check_model, read_body
from core.server.stream import Event, respond

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class Echo:
    """What `echo` asks for."""

    texts: dict[str, str]  # request id -> its prompt's text; empty without echo
    only: bool = False  # max_tokens was 0: the one token that had to be run is not shown


def completion_routes(client: EngineClient) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(http: Request) -> Response:
        info = client.require_ready()
        body = await read_body(http, CompletionRequest)
        check_model(body.model, info)
        requests, echo = await make_requests(body, client.codec, info)
        answer = CompletionAnswer(body, requests, echo, client.codec, info)
        return await respond(http, client, requests, answer, bool(body.stream))

    return router


async def make_requests(body: CompletionRequest, codec: Codec, info: EngineInfo) -> tuple[list[ClientRequest], Echo]:
    """Return one request for each prompt. Raises RequestError."""
    check_common(body)
    if body.best_of not in (None, body.n or 1):
        message = f"best_of is not supported yet, got {body.best_of}. Leave it out, or make it equal to n."
        raise InvalidParameter(message, "best_of")
    echo_only = bool(body.echo) and body.max_tokens == 0
    params = completion_params(body, info.vocab_size, echo_only)
    prompts = split_prompts(body.prompt)
    ids = await prompt_ids(prompts, codec, info, body.add_special_tokens)
    name = f"cmpl-{uuid.uuid4().hex}"
    requests = [
        ClientRequest(name if len(ids) == 1 else f"{name}-{index}", one, params, body.priority or 0)
        for index, one in enumerate(ids)
    ]
    if not body.echo:
        return requests, Echo({})
    shown = [one if isinstance(one, str) else await codec.decode(one, "echo") for one in prompts]
    texts = {request.id: text for request, text in zip(requests, shown, strict=True)}
    return requests, Echo(texts, echo_only)


def completion_params(body: CompletionRequest, vocab_size: int, echo_only: bool) -> SamplingParams:
    """Logprobs of an echoed prompt are the engine's prompt logprobs."""
    asked = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        asked = max(body.logprobs, asked or 0)
    limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    return make_params(
        body,
        vocab_size,
        max_tokens=1 if echo_only else limit,
        logprobs=body.logprobs,
        prompt_logprobs=asked,
    )


class CompletionAnswer:
    """text_completion: whole, or a chunk a step. Choice = prompt * n + sample."""

    def __init__(
        self, body: CompletionRequest, requests: Sequence[ClientRequest], echo: Echo, codec: Codec, info: EngineInfo
    ) -> None:
        self.body, self.echo, self.codec = body, echo, codec
        self.usage = Usage(requests)
        n = requests[0].params.n
        self.bases = {request.id: position * n for position, request in enumerate(requests)}
        self.prompts = {request.id: request.prompt_ids for request in requests}
        self.prompt_logprobs: dict[str, list[TokenLogprobs | None]] = {}  # by request id, for echo
        self.begun: dict[int, TextLogprobs] = {}  # by choice; its presence says that the prompt was echoed
        name = requests[0].id.split("-")[1]
        self.head = {
            "id": f"cmpl-{name}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": info.model_name,
        }

    # ------------------------------------------------------------------------------------------ one piece

    def full(self, samples: Sequence[Collected]) -> dict[str, Any]:
        self.usage.take_all(samples)
        if self.echo.only:
            self.usage.num_output = 0
        return {**self.head, "choices": [self._whole(sample) for sample in samples], "usage": self.usage.body()}

    def _whole(self, sample: Collected) -> dict[str, Any]:
        delta = Delta(
            sample.request.id,
            sample.index,
            sample.token_ids,
            sample.text,
            sample.logprobs,
            sample.finish_reason,
            sample.stop_reason,
            prompt_logprobs=sample.prompt_logprobs,
        )
        choice = self._choice(delta)
        if self.body.prompt_logprobs is not None and sample.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_entries(sample.prompt_logprobs, self.codec)
        return choice

    # ------------------------------------------------------------------------------------------ streamed

    def first(self) -> Iterable[Event]:
        return ()

    def events(self, delta: Delta) -> Iterable[Event]:
        if not self.echo.only:
            self.usage.take(delta)
        choice = self._choice(delta)
        if choice["text"] or choice["finish_reason"] or choice["logprobs"]:
            yield self._chunk([choice])

    def last(self) -> Iterable[Event]:
        if self.body.include_usage:
            yield {**self._chunk([]), "usage": self.usage.body()}

    def _chunk(self, choices: list[dict[str, Any]]) -> Event:
        made: Event = {**self.head, "choices": choices}
        if self.body.include_usage:
            made["usage"] = None
        return made

    # ------------------------------------------------------------------------------------------ both

    def _choice(self, delta: Delta) -> dict[str, Any]:
        """One choice with what the delta adds, after the prompt if it is echoed and this is the first delta."""
        index = self.bases[delta.request_id] + delta.index
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs[delta.request_id] = delta.prompt_logprobs
        echoes = index not in self.begun and bool(self.echo.texts)
        logprobs = self.begun.setdefault(index, TextLogprobs(self.body.logprobs or 0, self.codec))
        text = self.echo.texts[delta.request_id] if echoes else ""
        return {
            "index": index,
            "text": text if self.echo.only else text + delta.text,
            "logprobs": self._logprobs(delta, logprobs, echoes),
            "finish_reason": "length" if self.echo.only and delta.finish_reason else delta.finish_reason,
            "stop_reason": None if self.echo.only else delta.stop_reason,
        }

    def _logprobs(self, delta: Delta, logprobs: TextLogprobs, echoes: bool) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        parts = []
        if echoes:
            parts.append(logprobs.take(self.prompts[delta.request_id], self.prompt_logprobs[delta.request_id]))
        if delta.token_ids and not self.echo.only:
            parts.append(logprobs.take(delta.token_ids, delta.logprobs or []))
        return join(parts) if parts else None
