"""POST /tokenize and /detokenize, in vLLM's shape."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from core.errors import InvalidParameter
from core.server.client import EngineClient
from core.server.messages_in import template_messages
from core.server.openai import Message
from core.server.params import check_ids
from core.server.schema import Body, check_model, read_body
from core.server.stream import json_response


class TokenizeRequest(Body):
    """A prompt, or messages."""

    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True  # for a prompt
    add_generation_prompt: bool = True  # for messages
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    tokens: list[int]


def token_routes(client: EngineClient) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(http: Request) -> Response:
        info = client.require_ready()
        body = await read_body(http, TokenizeRequest)
        check_model(body.model, info)
        ids = await encode(body, client)
        tokenizer = client.codec.require("prompt")
        spelled = [tokenizer.id_to_token(one) for one in ids] if body.return_token_strs else None
        shown = {"count": len(ids), "max_model_len": info.max_model_len, "tokens": ids, "token_strs": spelled}
        return json_response(shown)

    @router.post("/detokenize")
    async def detokenize(http: Request) -> Response:
        info = client.require_ready()
        body = await read_body(http, DetokenizeRequest)
        check_model(body.model, info)
        check_ids(body.tokens, info.vocab_size, "tokens")
        return json_response({"prompt": await client.codec.decode(body.tokens, skip_special_tokens=False)})

    return router


async def encode(body: TokenizeRequest, client: EngineClient) -> list[int]:
    """Return the ids of the prompt or of the messages. Raises InvalidParameter."""
    if (body.prompt is None) == (body.messages is None):
        raise InvalidParameter("Send either prompt or messages.", "prompt")
    if body.prompt is not None:
        return await client.codec.encode(body.prompt, body.add_special_tokens)
    messages = template_messages(body.messages or [])
    return await client.codec.chat(messages, body.add_generation_prompt, body.chat_template_kwargs or {})
