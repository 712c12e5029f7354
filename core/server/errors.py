"""Errors as HTTP: every one becomes a status and a body in OpenAI's shape, {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from core.errors import CoreError, EngineDead, RequestError

logger = logging.getLogger("core_serve.server")

Body = dict[str, Any]


class HttpError(RequestError):
    """A refusal that exists on HTTP only (size, type, key, route): `status` and `code` are the error's own."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, param)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})


def status_of(error: Exception) -> int:
    """Return the HTTP status that tells of `error`."""
    if isinstance(error, RequestError):
        return error.status
    return 503 if isinstance(error, EngineDead) else 500


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> Body:
    """Return OpenAI's error body."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> Body:
    """Return the body that tells of `error`; an unforeseen one keeps its details for the log."""
    status = status_of(error)
    if isinstance(error, RequestError):
        return error_body(str(error), status, error.param, error.code)
    if isinstance(error, EngineDead):
        return error_body(str(error), status, code="engine_dead")
    if isinstance(error, CoreError):
        return error_body(str(error), status)
    return error_body("The server failed on this request; its log tells why.", status, code="internal_error")


def error_response(error: Exception) -> Response:
    """Return the HTTP answer that tells of `error`."""
    headers = dict(getattr(error, "headers", {}))
    if status_of(error) in (500, 501) or isinstance(error, EngineDead):
        # OpenAI's clients repeat any 5xx by themselves; a request that killed the engine must not come back alone.
        headers["x-should-retry"] = "false"
    return Response(to_json(describe(error)), status_of(error), headers, "application/json")


def install_handlers(app: FastAPI) -> None:
    """Make every exception of a route an answer in OpenAI's shape."""
    app.add_exception_handler(CoreError, _on_core_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_unforeseen)


async def _on_core_error(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, wrong method."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    messages = {
        404: HttpError(404, f"There is no {where}.", code="unknown_url"),
        405: HttpError(405, f"{where} is not how this path is called; see Allow.", code="method_not_allowed"),
    }
    shown = messages.get(error.status_code) or HttpError(error.status_code, str(error.detail))
    shown.headers.update(error.headers or {})
    return error_response(shown)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody reads this; 499 is what logs call it."""
    return Response(status_code=499)


async def _on_unforeseen(request: Request, error: Exception) -> Response:
    """Starlette raises it again after this answer, so that the HTTP server logs the traceback."""
    return error_response(error)


def renamed(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """Return `error` with `param` as the API in use calls it."""
    if error.param is not None and error.param in names:
        error.param = names[error.param]
    return error
