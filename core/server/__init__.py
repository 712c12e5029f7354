"""The HTTP server. This file imports nothing heavy: the command line reads ServerOptions to show its help."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.server.options import ServerOptions

if TYPE_CHECKING:
    from core.server.app import create_app
    from core.server.client import EngineClient
    from core.server.start import serve

__all__ = ["EngineClient", "ServerOptions", "create_app", "serve"]


def __getattr__(name: str) -> Any:
    """Load FastAPI and uvicorn when they are first needed."""
    if name == "create_app":
        from core.server.app import create_app

        return create_app
    if name == "EngineClient":
        from core.server.client import EngineClient

        return EngineClient
    if name == "serve":
        from core.server.start import serve

        return serve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
