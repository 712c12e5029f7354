"""One server from start to graceful end. HTTP is up at once, with 503, while the engine loads."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from core.config import EngineConfig
from core.contracts import Tokenizer
from core.engine_info import EngineInfo
from core.errors import EngineDead
from core.plugins import PluginHost
from core.server.app import create_app
from core.server.client import CLOSING, EngineClient
from core.server.options import ServerOptions
from core.server.spawn import Spawned
from core.server.start import listen

logger = logging.getLogger("core_serve.server")

MARGIN = 5.0  # seconds after the grace in which answers still get out
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_service(
    config: EngineConfig, options: ServerOptions, host: PluginHost, bound: socket.socket, engine: Spawned
) -> int:
    """Serve on a bound socket with an engine whose process runs already; return the exit code."""
    client = EngineClient(config, host, log_level=options.log_level, started=engine)
    return asyncio.run(Service(client, options, bound).run())


class Service:
    """HTTP and engine together. `stop` once: gracefully; twice: at once."""

    def __init__(self, client: EngineClient, options: ServerOptions, bound: socket.socket | None = None) -> None:
        """`bound`: the socket to serve on; without it one is bound. Raises ConfigError if the address is taken."""
        self.client, self.options = client, options
        self.socket = bound or listen(options.host, options.port)
        self.address: tuple[str, int] = self.socket.getsockname()[:2]  # the socket itself is closed at the end
        self.http = QuietServer(
            uvicorn.Config(
                create_app(client, options),
                log_config=None,
                log_level="warning" if options.log_level == "info" else options.log_level,
                access_log=options.access_log,
                lifespan="off",
                timeout_graceful_shutdown=int(options.shutdown_grace + MARGIN),
                timeout_keep_alive=75,
            )
        )
        self.error: BaseException | None = None  # why the engine could not be loaded
        self.stopping = False

    @property
    def url(self) -> str:
        """Where clients on this machine reach the server."""
        name, port = self.address
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name)
        return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"

    async def run(self) -> int:
        """Serve until stopped. Raises what the engine could not be loaded for."""
        with self._signals():
            await self.client.start()
            announcer = asyncio.create_task(self._announce())
            try:
                await self.http.serve(sockets=[self.socket])
            finally:
                announcer.cancel()
                await self.client.close()
        if self.error is not None:
            raise self.error
        return 0

    async def _announce(self) -> None:
        try:
            info = await self.client.wait_ready()
        except Exception as error:  # noqa: BLE001 - run() raises it again
            self.error = error
            self.stop()
            return
        print(announcement(info, self.url, self.options, self.client.tokenizer), file=sys.stderr, flush=True)

    # ------------------------------------------------------------------------------------------ the end

    def stop(self) -> None:
        """First call: no new requests, those in flight get the grace. Second: they end now."""
        if self.stopping:
            self.http.force_exit = True
            self._cut()
            return
        self.stopping = True
        if self.client.num_open:
            logger.info("Shutting down: %d requests get %g s.", self.client.num_open, self.options.shutdown_grace)
        self.client.drain()
        self.http.should_exit = True
        asyncio.get_running_loop().call_later(self.options.shutdown_grace, self._cut)

    def _cut(self) -> None:
        """Streams end with an error event, other requests with 503."""
        self.client.fail_all(EngineDead(CLOSING))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        mine = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        for number in mine:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in mine:
                loop.remove_signal_handler(number)


class QuietServer(uvicorn.Server):
    """uvicorn without its signal handlers, which end the process by the signal instead of with exit code 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


QUESTION = "What is the capital of France?"


def announcement(info: EngineInfo, url: str, options: ServerOptions, tokenizer: Tokenizer | None) -> str:
    """One line for people, and one to paste."""
    path, body = example(tokenizer)
    key = "" if options.api_key is None else " -H 'Authorization: Bearer YOUR_KEY'"
    text = json.dumps({"model": info.model_name, **body, "max_tokens": 32, "temperature": 0}).replace("'", "'\\''")
    call = f"curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d '{text}'"
    return f"Serving {info.model_name} ({info.impl_name}) at {url}\n{call}"


def example(tokenizer: Tokenizer | None) -> tuple[str, dict[str, Any]]:
    """A call that this model can answer."""
    if tokenizer is None:
        return "completions", {"prompt": [1, 2, 3]}
    if tokenizer.has_chat_template:
        return "chat/completions", {"messages": [{"role": "user", "content": QUESTION}]}
    return "completions", {"prompt": "The capital of France is"}
