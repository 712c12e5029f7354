"""EngineClient: the engine as the event loop sees it. Starts its process, and another one when it dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

import core.errors
from core.config import EngineConfig
from core.contracts import Tokenizer
from core.engine_info import EngineInfo
from core.errors import CoreError, EngineDead, InvalidParameter
from core.metrics import Metrics
from core.outputs import Delta
from core.plugins import PluginHost
from core.request import ClientRequest
from core.server.channel import EngineChannel
from core.server.codec import Codec, take_tokenizer
from core.server.errors import HttpError
from core.server.messages import (
    Abort,
    Accepted,
    Add,
    Crashed,
    LoadFailed,
    Opened,
    Ready,
    Refused,
    Reply,
    ResetDone,
    ResetPrefixCache,
    Shutdown,
    Stepped,
)
from core.server.process import BuildEngine, build_in_process
from core.server.requests import RequestStream
from core.server.spawn import Spawned, spawn

logger = logging.getLogger("core_serve.server")

LOADING = "The engine is still loading its model. Try again when /health answers 200."
RESTARTING = "The engine process died and is being started again. Try again when /health answers 200."
LOST = "The engine process died while this request ran, and is started again. Other requests may be to blame."
CLOSING = "The server is shutting down. Send the request to another one."


@dataclass(frozen=True)
class RestartPolicy:
    """When a dead engine process is started again."""

    backoff: float = 0.5  # seconds before the first restart; doubled for each quick death in a row
    max_backoff: float = 30.0  # seconds
    quick: float = 60.0  # seconds; a process that lived shorter died quickly
    max_quick_deaths: int = 5  # in a row; then it is left dead

    def delay(self, quick_deaths: int) -> float:
        return min(self.max_backoff, self.backoff * 2.0 ** max(0, quick_deaths - 1))


class EngineClient:
    """One engine in a process of its own. All methods belong to the event loop that called `start`."""

    def __init__(
        self,
        config: EngineConfig,
        host: PluginHost | None = None,
        *,
        build: BuildEngine = build_in_process,
        restart: RestartPolicy | None = None,
        log_level: str = "info",
        started: Spawned | None = None,
    ) -> None:
        """`started`: the first engine process, if it runs already."""
        self.config = config
        self.host = host or PluginHost.load(disable=config.disable_plugins)
        self.metrics = Metrics()
        self.codec = Codec(None)
        self.info: EngineInfo | None = None  # known once the model is loaded; kept over a restart
        self._build, self._started = build, started
        self._restart = restart or RestartPolicy()
        self._log_level = log_level
        self._channel: EngineChannel | None = None
        self._streams: dict[str, RequestStream] = {}  # by id of an unfinished request
        self._resets: list[asyncio.Future[None]] = []
        self._reason: str | None = LOADING  # why no request is taken now; None = ready
        self._closing = False
        self._quick_deaths = 0
        self._spawned = 0.0  # when the present process was started, monotonic seconds

    # ------------------------------------------------------------------------------------------ life

    async def start(self) -> None:
        """Start the engine's process and return at once; `wait_ready` tells when it answers."""
        self._loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._exited = asyncio.Event()
        self._tokenizer_task: asyncio.Task[None] | None = None  # from the engine's first word on
        self._spawn()

    async def wait_ready(self) -> EngineInfo:
        """Wait for the model. Raises what it or its tokenizer could not be loaded for."""
        await asyncio.shield(self._loaded)
        assert self.info is not None
        assert self._tokenizer_task is not None
        await self._tokenizer_task
        return self.info

    async def close(self, grace: float = 0.0) -> None:
        """Take no more requests, give those in flight `grace` seconds, then end the process."""
        self.drain()
        deadline = time.monotonic() + grace
        while self._streams and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self.fail_all(EngineDead(CLOSING))
        if self._tokenizer_task is not None:
            self._tokenizer_task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._tokenizer_task
        if self._channel is not None:
            self._end(self._channel)
            await self._exited.wait()
        if self._loaded.done() and not self._loaded.cancelled():
            self._loaded.exception()  # seen: asyncio would complain of it otherwise
        self.codec.close()

    def _end(self, channel: EngineChannel) -> None:
        """A process that serves is asked to end; one that loads does not listen yet."""
        if self._loaded.done():
            channel.send(Shutdown())
            asyncio.get_running_loop().call_later(5.0, channel.kill)
        else:
            channel.kill()

    def drain(self) -> None:
        """Take no more requests."""
        self._closing = True
        self._reason = CLOSING
        self.metrics.ready.set(0)

    def fail_all(self, error: Exception) -> None:
        """End every request in flight with `error`."""
        for stream in set(self._streams.values()):
            stream.fail(error)
            stream.close()
        for future in self._resets:
            if not future.done():
                future.set_exception(error)
        self._resets.clear()

    async def _take_tokenizer(self, pickled: bytes | None) -> None:
        found = await asyncio.to_thread(take_tokenizer, pickled, self.config, self.host)
        self.codec.close()
        self.codec = Codec(found)

    # ------------------------------------------------------------------------------------------ state

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.codec.tokenizer

    @property
    def reason(self) -> str | None:
        """Why no request is taken now; None when ready."""
        if self._reason is None and (self._tokenizer_task is None or not self._tokenizer_task.done()):
            return LOADING
        return self._reason

    @property
    def ready(self) -> bool:
        return self.reason is None

    @property
    def process_id(self) -> int | None:
        """Of the engine's process; None while there is none."""
        return None if self._channel is None else self._channel.process.pid

    @property
    def num_open(self) -> int:
        """Client requests in flight."""
        return len(self._streams)

    def require_ready(self) -> EngineInfo:
        """Return what is served. Raises HttpError 503 with the reason when no request can be taken."""
        reason = self.reason
        if reason is not None:
            raise HttpError(503, reason, code="engine_not_ready", headers={"retry-after": "1"})
        assert self.info is not None
        return self.info

    # ------------------------------------------------------------------------------------------ requests

    async def submit(self, *requests: ClientRequest) -> RequestStream:
        """Hand requests to the engine; return their stream once it has taken them all.

        Raises RequestError if it refuses one (then none is run) or is not ready, EngineDead if it dies. The caller
        closes the stream.
        """
        self.require_ready()
        taken = [request.id for request in requests if request.id in self._streams]
        if taken:
            raise InvalidParameter(f"A request with the id {taken[0]!r} is already running.", "request_id")
        stream = RequestStream(requests, self.abort)
        for request in requests:
            self._streams[request.id] = stream
            self._send(Add(request))
        try:
            await stream.accepted()
        except BaseException:
            stream.close()
            raise
        return stream

    async def generate(self, request: ClientRequest) -> AsyncIterator[Delta]:
        """Yield the deltas of one request. Closing or cancelling the iterator aborts it."""
        stream = await self.submit(request)
        try:
            while batch := await stream.next_batch():
                for delta in batch:
                    yield delta
        finally:
            stream.close()

    def abort(self, request_id: str) -> None:
        """Drop a request; an unknown id does nothing. Who reads its stream sees it end with "abort"."""
        stream = self._streams.pop(request_id, None)
        self.metrics.forget(request_id)
        if stream is None:
            return
        self._send(Abort(request_id))
        stream.drop(request_id)

    async def reset_prefix_cache(self) -> None:
        """Forget the K/V that is kept for prompts to come."""
        self.require_ready()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._resets.append(done)
        self._send(ResetPrefixCache())
        await done

    def _send(self, command: Add | Abort | ResetPrefixCache) -> None:
        if self._channel is not None:
            self._channel.send(command)

    # ------------------------------------------------------------------------------------------ replies

    def _on_reply(self, channel: EngineChannel, reply: Reply) -> None:
        if isinstance(reply, Stepped):
            self._on_stepped(reply)
        elif isinstance(reply, Accepted):
            if reply.request_id in self._streams:
                self._streams[reply.request_id].accept(reply.request_id)
        elif isinstance(reply, Refused):
            if reply.request_id in self._streams:
                self._streams.pop(reply.request_id).refuse(reply.request_id, reply.error)
        elif isinstance(reply, ResetDone):
            self._on_reset(reply)
        elif isinstance(reply, Opened):
            if self._tokenizer_task is None:  # one that is started again has the same
                self._tokenizer_task = asyncio.create_task(self._take_tokenizer(reply.tokenizer))
        elif isinstance(reply, Ready):
            self._on_ready(reply)
        else:
            self._on_failure(reply)

    def _on_stepped(self, reply: Stepped) -> None:
        known = [delta for delta in reply.deltas if delta.request_id in self._streams]
        self.metrics.on_deltas(known, time.monotonic())
        for delta in known:
            stream = self._streams[delta.request_id]
            stream.push(delta)
            if delta.request_id not in stream.open:
                del self._streams[delta.request_id]
                self.metrics.forget(delta.request_id)
        for event in reply.stats:
            self.metrics.observe(event)
        if reply.idle:
            self.metrics.on_idle()

    def _on_reset(self, reply: ResetDone) -> None:
        done = self._resets.pop(0)
        if done.done():
            return
        if reply.error is None:
            done.set_result(None)
        else:
            done.set_exception(reply.error)

    def _on_ready(self, reply: Ready) -> None:
        self.info = reply.info
        if not self._closing:
            self._reason = None
            self.metrics.ready.set(1)
            self.metrics.blocks.set(reply.info.num_blocks)
            self.metrics.free_blocks.set(reply.info.num_blocks)
        if not self._loaded.done():
            self._loaded.set_result(None)

    def _on_failure(self, reply: LoadFailed | Crashed) -> None:
        if isinstance(reply, Crashed):
            logger.error("The engine process failed: %s", reply.reason)
            return
        logger.error("The engine process could not load its model: %s", reply.message)
        if not self._loaded.done():
            kind = getattr(core.errors, reply.kind, CoreError)
            self._loaded.set_exception(kind(reply.message))

    # ------------------------------------------------------------------------------------------ death

    def _spawn(self) -> None:
        if self._closing:
            self._exited.set()
            return
        self._spawned = time.monotonic()
        self._channel = EngineChannel(self._on_reply, self._on_lost, self._on_exit)
        started, self._started = self._started, None
        self._channel.open(started or spawn(self.config, self.host.resolved, self._build, self._log_level))

    def _on_lost(self, channel: EngineChannel) -> None:
        self._channel = None
        self.metrics.on_idle()
        self.metrics.ready.set(0)
        if not self._closing:
            self._reason = RESTARTING
        self.fail_all(EngineDead(CLOSING if self._closing else LOST))

    def _on_exit(self, channel: EngineChannel, exitcode: int | None) -> None:
        if self._closing:
            self._exited.set()
            return
        self.metrics.deaths.inc()
        logger.error("The engine process ended with exit code %s.", exitcode)
        if not self._loaded.done():  # it never served: another try would end the same way
            self._loaded.set_exception(EngineDead(f"The engine process ended while loading, exit code {exitcode}."))
        if self._loaded.exception() is not None:
            self._give_up(str(self._loaded.exception()))
            return
        self._start_again(exitcode)

    def _start_again(self, exitcode: int | None) -> None:
        lived = time.monotonic() - self._spawned
        self._quick_deaths = self._quick_deaths + 1 if lived < self._restart.quick else 1
        if self._quick_deaths >= self._restart.max_quick_deaths:
            times = f"{self._quick_deaths} times in a row, each within {self._restart.quick:g} s"
            self._give_up(f"The engine process died {times} (exit code {exitcode}). Restart the server; see its log.")
            return
        delay = self._restart.delay(self._quick_deaths)
        logger.warning("The engine process is started again in %.1f s.", delay)
        asyncio.get_running_loop().call_later(delay, self._spawn)

    def _give_up(self, reason: str) -> None:
        logger.critical("%s", reason)
        self._reason = reason
