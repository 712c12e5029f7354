"""`core-serve` alone: serve a model over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from core.commands.options import byte_size, make_config
from core.config import EngineConfig
from core.demo import DEMO_NAME, demo_model_path
from core.plugins import PluginHost
from core.server.options import LOG_LEVELS, ServerOptions

F = TypeVar("F", bound=Callable[..., Any])
SERVER_FIELDS = ("host", "port", "api_key", "cors_origins", "max_request_bytes", "shutdown_grace", "log_level")

SERVER_OPTIONS = [
    click.option(
        "--served-model-name", metavar="NAME", help="The name in requests. Default: the last part of the path."
    ),
    click.option("--host", default=ServerOptions.host, show_default=True, help="Address to listen at."),
    click.option("--port", type=int, default=ServerOptions.port, show_default=True, help="0 takes any free one."),
    click.option("--api-key", metavar="KEY", envvar="CORE_API_KEY", show_envvar=True, help="Ask clients for this key."),
    click.option(
        "--cors-origin",
        "cors_origins",
        multiple=True,
        metavar="ORIGIN",
        help="Browsers may call from here; repeatable.",
    ),
    click.option(
        "--max-request-bytes",
        type=byte_size,
        default=ServerOptions.max_request_bytes,
        metavar="SIZE",
        help="Longest HTTP body. Default: 16MiB.",
    ),
    click.option(
        "--shutdown-grace",
        type=float,
        default=ServerOptions.shutdown_grace,
        show_default=True,
        metavar="SECONDS",
        help="Time that requests in flight get on SIGTERM.",
    ),
    click.option("--log-level", type=click.Choice(LOG_LEVELS), default=ServerOptions.log_level, show_default=True),
]


def server_options(function: F) -> F:
    """Add everything that ServerOptions takes."""
    for option in reversed(SERVER_OPTIONS):
        function = option(function)
    return function


def serve(given: Mapping[str, Any], host: PluginHost) -> int:
    """Serve until told to stop; return the exit code."""
    server = ServerOptions(**{name: given[name] for name in SERVER_FIELDS})
    config = make_config({name: value for name, value in given.items() if name not in SERVER_FIELDS}, host)
    from core.server.start import serve as run_server

    return run_server(_named(config), server, host)


def _named(config: EngineConfig) -> EngineConfig:
    """Settle what is served and its name, where the last part of the path would not tell."""
    if config.model is None:
        return replace(config, model=demo_model_path(), served_model_name=config.served_model_name or DEMO_NAME)
    if not Path(config.model).exists():  # a model of the local cache, whose folder is named by a hash
        return replace(config, served_model_name=config.served_model_name or config.model)
    return config
