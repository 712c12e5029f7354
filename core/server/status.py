"""What a server tells of itself: models, health, metrics, version; and the routes that it does not have yet."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

import core
from core.engine_info import EngineInfo
from core.metrics import CONTENT_TYPE
from core.server.client import EngineClient
from core.server.errors import HttpError
from core.server.schema import check_model
from core.server.stream import json_response

NOT_YET = ("/v1/embeddings", "/v1/responses")


def status_routes(client: EngineClient) -> APIRouter:
    router = APIRouter()
    created = int(time.time())

    @router.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [describe_model(client.require_ready(), created)]})

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        info = client.require_ready()
        check_model(model, info)
        return json_response(describe_model(info, created))

    @router.get("/health")
    async def health() -> Response:
        client.require_ready()
        return json_response({"status": "ok"})

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(client.metrics.render(), media_type=CONTENT_TYPE)

    @router.get("/version")
    async def version() -> Response:
        return json_response({"version": core.__version__})

    @router.post("/flush_cache")
    async def flush_cache() -> Response:
        await client.reset_prefix_cache()
        return json_response({"status": "ok"})

    for path in NOT_YET:
        router.add_api_route(path, not_yet(path), methods=["POST"])
    return router


def not_yet(path: str) -> Any:
    async def refuse() -> Response:
        raise HttpError(501, f"{path} is not supported yet. Use /v1/chat/completions.", code="not_supported")

    return refuse


def describe_model(info: EngineInfo, created: int) -> dict[str, Any]:
    """OpenAI's entry, and what serves it."""
    return {
        "id": info.model_name,
        "object": "model",
        "created": created,
        "owned_by": "core-serve",
        "root": info.model_path,
        "impl": info.impl_name,
        "attempts": [{"impl": name, "declined": reason} for name, reason in info.attempts],
        "attention": info.attention_name,
        "dtype": info.dtype,
        "device": info.device,
        "quantization": info.quantization,
        "max_model_len": info.max_model_len,
        "vocab_size": info.vocab_size,
        "prefix_caching": info.prefix_caching,
        "plugins": [{"name": name, "version": version} for name, version in info.plugins],
    }
