"""From deltas to the wire: server-sent events, or one JSON body. A client that goes away aborts its requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from core.errors import CoreError
from core.outputs import Delta
from core.request import ClientRequest
from core.server.client import EngineClient
from core.server.collect import Collected, collect
from core.server.errors import describe
from core.server.requests import RequestStream

logger = logging.getLogger("core_serve.server")

T = TypeVar("T")
Event = dict[str, Any]
DONE = b"data: [DONE]\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies must not collect events


class Answer(Protocol):
    """The shape of one API's answer to one body. Made for the body, used once."""

    def first(self) -> Iterable[Event]:
        """Events before any token."""
        ...

    def events(self, delta: Delta) -> Iterable[Event]:
        """Events for what a step added; none if it shows nothing."""
        ...

    def last(self) -> Iterable[Event]:
        """Events after the last token."""
        ...

    def full(self, samples: Sequence[Collected]) -> Any:
        """The whole answer."""
        ...


async def respond(
    http: Request, client: EngineClient, requests: Sequence[ClientRequest], answer: Answer, streaming: bool
) -> Response:
    """Run the requests and answer. Raises RequestError if the engine refuses one: before any byte is sent."""
    stream = await while_connected(http.receive, client.submit(*requests))
    if streaming:
        return EventStream(stream, answer)
    try:
        samples = await while_connected(http.receive, collect(stream))
    finally:
        stream.close()
    return json_response(answer.full(samples))


def json_response(body: Any, status: int = 200) -> Response:
    return Response(to_json(body), status, media_type="application/json")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it and raise ClientDisconnect when the client goes away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        await cancel(task, gone)


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait until they have cleaned up."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task


class EventStream(Response):
    """A stream of server-sent events that ends with the requests, with an error event, or with the client."""

    media_type = "text/event-stream"

    def __init__(self, stream: RequestStream, answer: Answer) -> None:
        self.status_code = 200
        self.background = None
        self.stream, self.answer = stream, answer
        self.init_headers(HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(send))
        except ClientDisconnect:
            pass  # nobody is left to tell
        finally:
            self.stream.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await self._send_events(send)
            await _send_bytes(send, DONE)
        except Exception as error:
            if not isinstance(error, CoreError):
                logger.exception("A stream failed.")
            await _send_bytes(send, encode([describe(error)]))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, send: Send) -> None:
        await _send_bytes(send, encode(self.answer.first()))
        while batch := await self.stream.next_batch():
            await _send_bytes(send, b"".join(encode(self.answer.events(delta)) for delta in batch))
        await _send_bytes(send, encode(self.answer.last()))


async def _send_bytes(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


def encode(events: Iterable[Event]) -> bytes:
    """Return events as they go over the wire."""
    return b"".join(b"data: " + to_json(event) + b"\n\n" for event in events)
