"""serve(): bind, start the engine's process, and only then import the HTTP stack, while that process imports torch."""

from __future__ import annotations

import logging
import socket

from core.config import EngineConfig
from core.errors import ConfigError
from core.plugins import PluginHost
from core.server.options import ServerOptions
from core.server.process import LOG_FORMAT, build_in_process
from core.server.spawn import spawn


def serve(config: EngineConfig, options: ServerOptions, host: PluginHost | None = None) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code. Raises CoreError if the model cannot be served."""
    logging.basicConfig(level=options.log_level.upper(), format=LOG_FORMAT)
    host = host or PluginHost.load(disable=config.disable_plugins)
    bound = listen(options.host, options.port)
    engine = spawn(config, host.resolved, build_in_process, options.log_level)
    try:
        from core.server.run import run_service

        return run_service(config, options, host, bound, engine)
    finally:
        bound.close()
        engine.kill()


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket, before anything is loaded. Raises ConfigError if the address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigError(f"Cannot listen at {host!r}: {error.strerror}. Choose another --host.") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        message = f"Cannot listen at {host} port {port}: {error.strerror}. Choose another --port or --host."
        raise ConfigError(message) from error
    return made
