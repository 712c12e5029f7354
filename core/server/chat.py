"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from core.engine_info import EngineInfo
from core.errors import RequestError
from core.outputs import Delta
from core.request import ClientRequest
from core.server.client import EngineClient
from core.server.codec import Codec
from core.server.collect import Collected, Usage
from core.server.errors import renamed
from core.server.logprobs import chat_logprobs, prompt_entries
from core.server.messages_in import template_messages
from core.server.openai import ChatRequest, check_common
from core.server.params import make_params
from core.server.prompts import check_prompt
from core.server.schema import check_model, read_body
from core.server.stream import Event, respond


def chat_routes(client: EngineClient) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        info = client.require_ready()
        body = await read_body(http, ChatRequest)
        check_model(body.model, info)
        try:
            request = await make_request(body, client.codec, info)
            answer = ChatAnswer(body, request, client.codec, info)
            return await respond(http, client, [request], answer, bool(body.stream))
        except RequestError as error:
            raise renamed(error, _names(body)) from error

    return router


def _names(body: ChatRequest) -> dict[str, str]:
    """What the chat API calls the fields that the engine complains of."""
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return {"prompt": "messages", "logprobs": "top_logprobs", "max_tokens": limit}


async def make_request(body: ChatRequest, codec: Codec, info: EngineInfo) -> ClientRequest:
    """Return what the engine shall run. Raises RequestError."""
    check_common(body)
    params = make_params(
        body,
        info.vocab_size,
        max_tokens=body.limit,
        logprobs=body.num_logprobs,
        prompt_logprobs=body.prompt_logprobs,
    )
    options = body.chat_template_kwargs or {}
    ids = await codec.chat(template_messages(body.messages), body.add_generation_prompt, options)
    check_prompt(ids, info, "messages")
    return ClientRequest(f"chatcmpl-{uuid.uuid4().hex}", ids, params, body.priority or 0)


class ChatAnswer:
    """chat.completion, or chat.completion.chunk a step."""

    def __init__(self, body: ChatRequest, request: ClientRequest, codec: Codec, info: EngineInfo) -> None:
        self.request, self.codec = request, codec
        self.top = request.params.logprobs
        self.include_usage = body.include_usage
        self.usage = Usage([request])
        self.head = {"id": request.id, "created": int(time.time()), "model": info.model_name}

    # ------------------------------------------------------------------------------------------ one piece

    def full(self, samples: Sequence[Collected]) -> dict[str, Any]:
        self.usage.take_all(samples)
        made = {
            **self.head,
            "object": "chat.completion",
            "choices": [self._choice(sample) for sample in samples],
            "usage": self.usage.body(),
        }
        if samples[0].prompt_logprobs is not None:
            made["prompt_logprobs"] = prompt_entries(samples[0].prompt_logprobs, self.codec)
        return made

    def _choice(self, sample: Collected) -> dict[str, Any]:
        return {
            "index": sample.index,
            "message": {"role": "assistant", "content": sample.text, "refusal": None},
            "logprobs": self._logprobs(sample.token_ids, sample.logprobs),
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }

    def _logprobs(self, token_ids: Sequence[int], found: Sequence[Any] | None) -> dict[str, Any] | None:
        return None if self.top is None else chat_logprobs(token_ids, found or [], self.top, self.codec)

    # ------------------------------------------------------------------------------------------ streamed

    def first(self) -> Iterable[Event]:
        for index in range(self.request.params.n):
            yield self._chunk([_choice_chunk(index, {"role": "assistant", "content": ""})])

    def events(self, delta: Delta) -> Iterable[Event]:
        self.usage.take(delta)
        shows_logprobs = self.top is not None and delta.token_ids
        if not (delta.text or delta.finish_reason or shows_logprobs):
            return
        choice = _choice_chunk(delta.index, {"content": delta.text} if delta.text or shows_logprobs else {})
        choice["logprobs"] = self._logprobs(delta.token_ids, delta.logprobs) if shows_logprobs else None
        choice["finish_reason"] = delta.finish_reason
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        yield self._chunk([choice])

    def last(self) -> Iterable[Event]:
        if self.include_usage:
            yield {**self._chunk([]), "usage": self.usage.body()}

    def _chunk(self, choices: list[dict[str, Any]]) -> Event:
        made: Event = {**self.head, "object": "chat.completion.chunk", "choices": choices}
        if self.include_usage:
            made["usage"] = None
        return made


def _choice_chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
