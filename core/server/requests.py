"""RequestStream: the deltas of one or several client requests, as the event loop reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from core.errors import CoreError
from core.outputs import Delta
from core.request import ClientRequest


class RequestStream:
    """Filled by EngineClient, read by one route. `close` aborts what has not finished."""

    def __init__(self, requests: Sequence[ClientRequest], abort: Callable[[str], None]) -> None:
        self.requests = tuple(requests)
        self.open = {request.id: set(range(request.params.n)) for request in requests}  # samples that have not finished
        self._unanswered = set(self.open)  # requests that the engine has neither accepted nor refused
        self._abort = abort
        self._deltas: list[Delta] = []
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    # ------------------------------------------------------------------------------------------ filling

    def accept(self, request_id: str) -> None:
        self._unanswered.discard(request_id)
        self._changed.set()

    def refuse(self, request_id: str, error: Exception) -> None:
        """The engine does not run this request, so none of the stream's is wanted."""
        self.open.pop(request_id, None)
        self.fail(error)

    def push(self, delta: Delta) -> None:
        """Take a delta; the last one of a request's last sample closes that request. A failed sample fails the body."""
        if delta.finish_reason == "error":
            self.fail(CoreError(f"The engine failed on this request: {delta.stop_reason}"))
        else:
            self._deltas.append(delta)
        if delta.finish_reason is not None:
            samples = self.open[delta.request_id]
            samples.discard(delta.index)
            if not samples:
                del self.open[delta.request_id]
        self._changed.set()

    def drop(self, request_id: str) -> None:
        """Somebody aborted a request: its samples end with "abort"."""
        self._unanswered.discard(request_id)
        for index in sorted(self.open.pop(request_id, ())):
            self._deltas.append(Delta(request_id, index, finish_reason="abort"))
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """End the stream with an error, which comes after the deltas that have arrived."""
        self._error = self._error or error
        self._changed.set()

    # ------------------------------------------------------------------------------------------ reading

    async def accepted(self) -> None:
        """Wait until the engine has taken every request. Raises what it refused one with."""
        while self._unanswered and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error

    async def next_batch(self) -> list[Delta]:
        """Return the deltas that have arrived, at least one; [] at the end. Raises what the stream failed with."""
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if not self.open:
                return []
            await self._wait()
        batch, self._deltas = self._deltas, []
        return batch

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def close(self) -> None:
        """Abort what is still running. Safe to call twice."""
        for request_id in list(self.open):
            del self.open[request_id]
            self._abort(request_id)
