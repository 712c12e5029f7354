"""Chat messages as OpenAI's clients send them -> as chat templates read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from core.errors import InvalidParameter
from core.server.openai import Message


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return plain messages with text content. Raises InvalidParameter naming the message at fault."""
    if not messages:
        raise InvalidParameter("messages is empty; it needs at least one message.", "messages")
    return [_one(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _one(message: Message, where: str) -> dict[str, Any]:
    # templates know "system" only; OpenAI's newer models call the same thing "developer"
    role = "system" if message.role == "developer" else message.role
    made: dict[str, Any] = {"role": role, "content": _content(message, where)}
    if message.tool_calls:
        made["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)]
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            made[name] = value
    return made


def _content(message: Message, where: str) -> str:
    """A text, or text parts put together."""
    content, param = message.content, f"{where}.content"
    if isinstance(content, str):
        return content
    if content is None and message.role == "assistant" and (message.tool_calls or message.refusal):
        return message.refusal or ""
    if not isinstance(content, list):
        raise InvalidParameter(f"{param} must be a string or a list of text parts.", param)
    return "".join(_part(part, f"{param}[{index}]") for index, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind is None:
        raise InvalidParameter(f'{where} must be an object like {{"type": "text", "text": ...}}.', where)
    if kind not in ("text", "refusal"):
        raise InvalidParameter(f"{where} is of type {kind!r}; only text is supported.", where)
    text = part.get(kind)
    if not isinstance(text, str) or set(part) != {"type", kind}:
        raise InvalidParameter(f"{where} must hold just type and {kind}, which is a string.", where)
    return text


def _tool_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """OpenAI writes the arguments as JSON text, templates expect the object."""
    function = call.get("function")
    if call.get("type", "function") != "function" or not isinstance(function, dict):
        raise InvalidParameter(f'{where} must be {{"id", "type": "function", "function": {{...}}}}.', where)
    try:
        arguments = json.loads(function["arguments"])
        name = function["name"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise InvalidParameter(f"{where}.function must have a name and arguments in JSON.", where) from None
    if not isinstance(arguments, dict) or not isinstance(name, str):
        raise InvalidParameter(f"{where}.function must have a name and an object of arguments.", where)
    return {"id": call.get("id"), "type": "function", "function": {"name": name, "arguments": arguments}}
