"""Disconnects, the death of the engine's process, keys, browsers."""

import os
import signal
import threading

import httpx
import pytest
import standin

from core.server.client import RestartPolicy

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG = {"prompt": "abc", "max_tokens": 190}


# ------------------------------------------------------------------------------------------ disconnects


def aborted(server):
    return server.metric("requests_aborted_total")


def test_a_client_that_leaves_a_stream_aborts_its_request(slow_server):
    server, before = slow_server, aborted(slow_server)
    body = {**LONG, "stream": True, "n": 2}
    with httpx.stream("POST", server.service.url + TEXT, json=body) as response:
        next(response.iter_lines())
    server.wait_for(lambda: aborted(server) == before + 2, "both samples were aborted")
    assert server.call(lambda: server.client.num_open) == 0


def test_a_client_that_does_not_wait_for_its_answer_aborts_it(slow_server):
    server, before = slow_server, aborted(slow_server)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.service.url + TEXT, json=LONG, timeout=0.3)
    server.wait_for(lambda: aborted(server) == before + 1, "it was aborted")
    assert server.post(TEXT, prompt="a", max_tokens=1).status_code == 200


def test_an_abort_by_somebody_else_ends_the_stream_with_abort(slow_server, events):
    server = slow_server
    with server.http.stream("POST", TEXT, json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        name = next(line for line in lines if line)
        request_id = name.split('"id":"')[1].split('"')[0]
        server.call(server.client.abort, request_id)
        last = [line for line in lines if '"finish_reason":"abort"' in line]
    assert len(last) == 1


# ------------------------------------------------------------------------------------------ death


def test_a_request_that_kills_the_engine_fails_and_the_next_one_is_served(start):
    server = start(pause=0.005).wait_ready()
    found = {}

    def bystander():
        with server.http.stream("POST", TEXT, json={**LONG, "stream": True}) as response:
            found["lines"] = [line for line in response.iter_lines() if line]

    thread = threading.Thread(target=bystander)
    thread.start()
    server.wait_for(lambda: server.metric("requests_running") == 1, "the bystander runs")
    response = server.post(TEXT, prompt="CRASH")
    thread.join()
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_dead"
    assert response.headers["x-should-retry"] == "false"  # or OpenAI's client would kill the next one too
    assert '"error"' in found["lines"][-1]
    server.wait_ready()
    assert server.post(TEXT, prompt="abc", max_tokens=3).json()["choices"][0]["text"] == "abc"
    assert server.metric("engine_deaths_total") == 1


def test_an_engine_process_that_is_killed_is_started_again(start):
    server = start().wait_ready()
    first = server.call(lambda: server.client.process_id)
    os.kill(first, signal.SIGKILL)
    server.wait_for(lambda: server.metric("engine_deaths_total") == 1, "the death was seen")
    server.wait_ready()
    assert server.call(lambda: server.client.process_id) != first
    assert server.post(TEXT, prompt="a").status_code == 200


def test_while_the_engine_is_away_requests_get_503_and_why(start):
    server = start(restart=RestartPolicy(backoff=3600, max_backoff=3600)).wait_ready()
    os.kill(server.call(lambda: server.client.process_id), signal.SIGKILL)
    server.wait_for(lambda: server.health() == 503, "health tells")
    for response in (server.http.get("/health"), server.post(TEXT, prompt="a"), server.http.get("/v1/models")):
        assert response.status_code == 503
        assert "being started again" in response.json()["error"]["message"]
    assert server.metric("engine_ready") == 0


def test_an_engine_that_dies_again_and_again_is_left_dead_with_the_reason(start):
    server = start(restart=RestartPolicy(backoff=0, max_quick_deaths=2)).wait_ready()
    assert server.post(TEXT, prompt="CRASH").status_code == 503
    server.wait_for(lambda: server.metric("engine_deaths_total") == 1, "the first death was seen")
    server.wait_ready()
    assert server.post(TEXT, prompt="CRASH").status_code == 503
    server.wait_for(lambda: "2 times in a row" in server.http.get("/health").text, "it gives up")
    assert server.health() == 503


def test_restarts_wait_longer_each_time_up_to_a_limit():
    policy = RestartPolicy(backoff=1, max_backoff=5)
    assert [policy.delay(deaths) for deaths in (1, 2, 3, 4, 5)] == [1, 2, 4, 5, 5]


def test_a_model_that_cannot_be_served_ends_the_server_with_its_own_error(start):
    server = start(refuse=True)
    server.thread.join(60)
    assert (type(server.result).__name__, str(server.result)) == ("ConfigError", "This model cannot be served.")


def test_an_engine_that_dies_while_loading_ends_the_server(start):
    server = start(die_loading=True)
    server.thread.join(60)
    assert type(server.result).__name__ == "EngineDead"
    assert "exit code 7" in str(server.result)


def test_the_server_s_process_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, core.server.run; sys.exit('torch' in sys.modules or 'core.engine' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_generate_yields_deltas_and_aborts_when_closed(slow_server):
    """The Python side of the client, as a plugin's route uses it."""
    import asyncio

    from core.request import ClientRequest
    from core.sampling_params import SamplingParams

    server, before = slow_server, aborted(slow_server)

    async def read_two():
        found = []
        stream = server.client.generate(ClientRequest("mine", list(b"abc"), SamplingParams(max_tokens=100)))
        async for delta in stream:
            found.append(delta.text)
            if len(found) == 2:
                break
        await stream.aclose()
        return found

    assert asyncio.run_coroutine_threadsafe(read_two(), server.loop).result(60) == ["a", "b"]
    server.wait_for(lambda: aborted(server) == before + 1, "closing aborted it")


# ------------------------------------------------------------------------------------------ keys, browsers


def test_a_key_is_asked_for_everywhere_but_for_probes(start):
    server = start(http={"api_key": "s3cret"}).wait_ready()
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}, {"authorization": "Bearer é"}):
        encoded = {name: value.encode() for name, value in headers.items()}
        response = server.http.post(TEXT, json={"prompt": "a"}, headers=encoded)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert server.http.get("/v1/models").status_code == 401
    assert server.http.get("/nothing").status_code == 401
    good = {"authorization": "Bearer s3cret"}
    assert server.http.post(TEXT, json={"prompt": "a"}, headers=good).status_code == 200
    assert (server.health(), server.http.get("/metrics").status_code) == (200, 200)


def test_browsers_of_the_named_origin_may_call_also_where_a_key_is_asked(start):
    server = start(http={"api_key": "k", "cors_origins": ("https://app.example",)}).wait_ready()
    ask = {"origin": "https://app.example", "access-control-request-method": "POST"}
    allowed = server.http.options(TEXT, headers=ask)
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    refused = server.http.options(TEXT, headers={**ask, "origin": "https://other.example"})
    assert "access-control-allow-origin" not in refused.headers
    error = server.http.post(TEXT, json={}, headers={"origin": "https://app.example"})
    assert (error.status_code, error.headers["access-control-allow-origin"]) == (401, "https://app.example")


def test_without_named_origins_no_browser_is_let_in(server):
    response = server.http.get("/health", headers={"origin": "https://app.example"})
    assert "access-control-allow-origin" not in response.headers


def test_a_plugin_s_routes_are_served():
    from fastapi import FastAPI

    from core.hookspecs import hookimpl
    from core.plugins import PluginHost
    from core.server.app import create_app
    from core.server.options import ServerOptions

    class Plugin:
        API_VERSION = ((1, 0), (1, 0))

        @hookimpl
        def register_routes(self, app: FastAPI, engine):
            app.add_api_route("/mine", lambda: {"ready": engine.ready})

    client = standin.make_client()
    client.host = PluginHost.load(extra={"mine": Plugin()})
    assert "/mine" in [getattr(route, "path", None) for route in create_app(client, ServerOptions()).routes]
