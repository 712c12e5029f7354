"""A live server over the stand-in engine: real HTTP, a real engine process, no model."""

import asyncio
import contextlib
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the engine's process imports standin by name

import standin

from core.server.options import ServerOptions
from core.server.run import Service

PATIENCE = 60.0  # seconds


class LiveServer:
    """A server in a thread."""

    def __init__(self, client_options, options):
        self.started = threading.Event()
        self.client_options = client_options
        self.options = ServerOptions(port=0, shutdown_grace=0.0, log_level="critical", **options)
        self.result = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        assert self.started.wait(PATIENCE)
        self.http = httpx.Client(base_url=self.service.url, timeout=PATIENCE)

    def run(self):
        try:
            self.result = asyncio.run(self.main())
        except Exception as error:
            self.result = error
        self.started.set()

    async def main(self):
        self.loop = asyncio.get_running_loop()
        self.service = Service(standin.make_client(**self.client_options), self.options)
        self.client = self.service.client
        self.loop.call_soon(self.started.set)
        return await self.service.run()

    def call(self, function, *arguments):
        """Run a function on the server's event loop and return its result."""

        async def run():
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(PATIENCE)

    def wait_for(self, holds, what):
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, f"waited in vain: {what}"
            time.sleep(0.01)

    def health(self):
        return self.http.get("/health").status_code

    def wait_ready(self):
        self.wait_for(lambda: self.health() == 200, "the server is ready")
        return self

    def post(self, path, **body):
        return self.http.post(path, json=body)

    def metric(self, name):
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"core_serve_{name} "):
                return float(line.split()[-1])
        return 0.0

    def stop(self):
        if self.thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self.service.stop)
        self.thread.join(PATIENCE)
        self.http.close()


@pytest.fixture
def start():
    """Return a function that starts a server: options of the stand-in's client, then ServerOptions in `http`."""
    servers = []

    def make(http=None, **client_options):
        servers.append(LiveServer(client_options, http or {}))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(scope="package")
def server():
    """One ready server, for tests that leave it as it was."""
    made = LiveServer({}, {})
    yield made.wait_ready()
    made.stop()


@pytest.fixture(scope="package")
def slow_server():
    """One whose steps take long enough to be interrupted."""
    made = LiveServer({"pause": 0.02}, {})
    yield made.wait_ready()
    made.stop()


def read_events(response):
    """Return the data of server-sent events: objects, and "[DONE]" as it stands."""
    import json

    found = []
    for line in response.iter_lines():
        if line:
            assert line.startswith("data: "), line
            data = line.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


@pytest.fixture
def events():
    return read_events
