"""Signals, the address, and the end of both processes: a server in a process of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from core.errors import ConfigError
from core.server.options import ServerOptions
from core.server.start import listen

SCRIPT = Path(__file__).parent / "standin.py"
TEXT = "/v1/completions"


class Process:
    def __init__(self, *options):
        command = [sys.executable, str(SCRIPT), *options]
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines = []
        while "Serving" not in (line := self.popen.stderr.readline()):
            assert line, self.lines
            self.lines.append(line)
        self.announcement = line
        self.curl = self.popen.stderr.readline()
        self.url = line.split(" at ")[1].strip()
        threading.Thread(target=self.drain, daemon=True).start()

    def drain(self):
        with contextlib.suppress(ValueError):
            for line in self.popen.stderr:
                self.lines.append(line)

    def children(self):
        """Ids of the living child processes that run an engine."""
        found = Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children").read_text().split()
        return [int(one) for one in found if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]

    def end(self):
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        self.popen.stderr.close()


@pytest.fixture
def launch():
    made = []

    def start(*options):
        made.append(Process(*options))
        return made[-1]

    yield start
    for one in made:
        one.end()


def alive(pid):
    """True while the process runs; one that waits to be reaped is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_stream(process, found, **fields):
    """Start reading a stream in a thread; return once its first event is there."""
    begun = threading.Event()

    def run():
        body = {"prompt": "abc", "stream": True, "max_tokens": 190, **fields}
        with httpx.stream("POST", process.url + TEXT, json=body, timeout=60) as response:
            for line in response.iter_lines():
                found.append(line)
                begun.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(60)
    return thread


def test_the_announcement_names_model_and_implementation_and_its_curl_line_works(launch):
    process = launch()
    assert process.announcement == f"Serving echo (standin) at {process.url}\n"
    done = subprocess.run(["sh", "-c", process.curl.replace("curl", "curl -sf", 1)], capture_output=True, text=True)
    assert '"content":"user:What is the capital' in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server_with_code_0_and_its_engine_with_it(launch, number):
    process = launch()
    engine = process.children()
    assert len(engine) == 1
    process.popen.send_signal(number)
    assert process.popen.wait(60) == 0
    assert not alive(engine[0])


def test_requests_in_flight_are_finished_and_new_ones_refused(launch):
    process, found = launch("--pause", "0.02"), []
    thread = read_stream(process, found, max_tokens=100)
    process.popen.terminate()
    wait_for(lambda: not connects(process.url))
    thread.join(60)
    assert found[-2:] == ["data: [DONE]", ""]
    assert process.popen.wait(60) == 0


def test_after_the_grace_streams_end_with_an_error_event(launch):
    process, found = launch("--pause", "0.2", "--grace", "0.3"), []
    thread = read_stream(process, found)
    process.popen.terminate()
    thread.join(60)
    assert "shutting down" in [line for line in found if line][-1]
    assert process.popen.wait(60) == 0


def test_a_second_signal_does_not_wait_for_the_grace(launch):
    process, found = launch("--pause", "0.2", "--grace", "3600"), []
    thread = read_stream(process, found)
    process.popen.terminate()
    wait_for(lambda: not connects(process.url))
    process.popen.terminate()
    assert process.popen.wait(60) == 0
    thread.join(60)


def test_a_signal_to_the_whole_group_lets_the_engine_finish(launch):
    """As Ctrl-C and service managers send it."""
    process, found = launch("--pause", "0.02"), []
    thread = read_stream(process, found, max_tokens=60)
    engine = process.children()[0]
    os.kill(engine, signal.SIGTERM)
    os.kill(engine, signal.SIGINT)
    process.popen.terminate()
    thread.join(60)
    assert found[-2] == "data: [DONE]"
    assert process.popen.wait(60) == 0


def test_the_engine_dies_with_the_server_also_in_the_middle_of_a_step(launch):
    process, found = launch("--pause", "3600"), []
    engine = process.children()[0]
    thread = threading.Thread(target=lambda: found.append(try_post(process)), daemon=True)
    thread.start()
    wait_for(lambda: "core_serve_engine_ready 1.0" in httpx.get(process.url + "/metrics").text)
    process.popen.kill()
    wait_for(lambda: not alive(engine))


def try_post(process):
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(process.url + TEXT, json={"prompt": "abc"}, timeout=60)


def connects(url):
    try:
        httpx.get(url + "/health")
    except httpx.HTTPError:
        return False
    return True


def test_an_address_in_use_is_told_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}.*Choose another --port"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="--host"):
        listen("no.such.host.invalid", 0)


@pytest.mark.parametrize(
    "options",
    [
        {"port": 70000},
        {"max_request_bytes": 0},
        {"shutdown_grace": -1},
        {"shutdown_grace": float("nan")},
        {"log_level": "loud"},
        {"api_key": ""},
    ],
)
def test_an_option_that_cannot_be_right_is_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        ServerOptions(**options)
