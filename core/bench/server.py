"""A server of our own for `bench serve`, in a process of its own, stopped again however the measurement ends."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from core.config import EngineConfig
from core.errors import CoreError
from core.server.client import EngineClient
from core.server.options import ServerOptions
from core.server.run import Service

START_S = 900.0  # for a server to load its model
STOP_S = 60.0


@contextmanager
def running_server(config: EngineConfig) -> Iterator[str]:
    """Start a server on a free port of this machine; yield its URL once it answers. Raises CoreError if it ends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(config, theirs))
    process.start()
    theirs.close()
    try:
        url = _received(ours)
        wait_until_ready(url, process)
        yield url
    finally:
        process.terminate()
        process.join(STOP_S)
        if process.is_alive():
            process.kill()
            process.join()
        ours.close()


def _serve(config: EngineConfig, pipe: Connection) -> None:
    """The server's process."""
    options = ServerOptions(port=0, log_level="warning")
    service = Service(EngineClient(config, log_level=options.log_level), options)
    pipe.send(service.url)
    try:
        code = asyncio.run(service.run())
    except CoreError as error:
        print(f"core-serve: error: {error}", file=sys.stderr)
        code = 1
    sys.exit(code)


def _received(pipe: Connection) -> str:
    try:
        return str(pipe.recv())
    except EOFError:
        raise CoreError("The server ended while it was started; its own message stands above.") from None


def wait_until_ready(url: str, process: SpawnProcess | None = None, limit: float = START_S) -> None:
    """Wait for /health. Raises CoreError when the time is over, or `process` has ended."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if process is not None and not process.is_alive():
            raise CoreError("The server ended before it was ready; its own message stands above.")
        if _is_ready(url):
            return
        time.sleep(0.2)
    raise CoreError(f"No server at {url} says that it is ready (/health) within {limit:.0f} s.")


def _is_ready(url: str) -> bool:
    """An error status is an exception of urllib's own."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False
