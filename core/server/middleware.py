"""What stands before every route: the key and the size of the body. Plain ASGI, so that streams stay streams."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.server.errors import HttpError, error_response

OPEN_PATHS = frozenset({"/health", "/metrics"})  # for probes and scrapers, which have no key


class ApiKey:
    """Lets in who shows `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self.expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._fits(scope):
            await self.app(scope, receive, send)
            return
        message = "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'."
        error = HttpError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        await error_response(error)(scope, receive, send)

    def _fits(self, scope: Scope) -> bool:
        found = Headers(scope=scope).get("authorization", "").encode("latin-1")
        return hmac.compare_digest(found, self.expected)


class BodyLimit:
    """Refuses a body above `limit` bytes: by its Content-Length at once, else while it is read."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stated = Headers(scope=scope).get("content-length", "")
        if stated.isdigit() and int(stated) > self.limit:
            await error_response(self._refusal())(scope, receive, send)
            return
        await self.app(scope, self._counting(receive), send)

    def _counting(self, receive: Receive) -> Receive:
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.limit:
                raise self._refusal()
            return message

        return counted

    def _refusal(self) -> HttpError:
        message = f"The body is larger than {self.limit} bytes. Send less, or start with a larger --max-request-bytes."
        return HttpError(413, message, code="request_too_large")
