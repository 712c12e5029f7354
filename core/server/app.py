"""The HTTP application: the builtin routes, then those of plugins."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from core.server.chat import chat_routes
from core.server.client import EngineClient
from core.server.completions import completion_routes
from core.server.errors import install_handlers
from core.server.middleware import ApiKey, BodyLimit
from core.server.native import generate_routes
from core.server.options import ServerOptions
from core.server.status import status_routes
from core.server.tokens import token_routes


def create_app(client: EngineClient, options: ServerOptions) -> FastAPI:
    """Return the application. The caller starts and closes `client`."""
    app = FastAPI(title="core-serve", openapi_url=None)  # routes read their bodies themselves: no schema to show
    install_handlers(app)
    for make in (chat_routes, completion_routes, generate_routes, token_routes, status_routes):
        app.include_router(make(client))
    _add_middleware(app, options)
    client.host.register_routes(app, client)
    return app


def _add_middleware(app: FastAPI, options: ServerOptions) -> None:
    """The last added is the first asked: CORS answers a browser's preflight, which has no key."""
    app.add_middleware(BodyLimit, limit=options.max_request_bytes)
    if options.api_key is not None:
        app.add_middleware(ApiKey, key=options.api_key)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
