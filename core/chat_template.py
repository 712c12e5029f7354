"""ChatTemplate: a conversation -> the prompt text, as transformers renders it. Imports jinja2 when first used.

Templates come with checkpoints, so they are foreign code: they run in jinja2's immutable sandbox, and they see plain
data only, never the caller's objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from core.errors import CheckpointError, InvalidParameter

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from jinja2.ext import Extension

RESERVED = frozenset(  # arguments of transformers' apply_chat_template that are not variables of the template
    (
        "conversation",
        "chat_template",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    )
)
TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # ends in a space, to see whether the template trims the message
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # names of one thing; the first is the standard one


class ChatTemplate:
    """One Jinja template, compiled when it is first rendered."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """`special_tokens` are variables of the template: bos_token, eos_token ..."""
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._template: Template | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_options: Any,
    ) -> str:
        """Return the prompt text. Raises InvalidParameter("messages") if the template refuses the conversation.

        With `continue_final_message` the text ends where the last message ends, so that the model goes on with it.
        """
        _check_options(template_options, add_generation_prompt, continue_final_message)
        talk = _checked_messages(messages)
        final = _mark_end(talk[-1]) if continue_final_message else ""
        variables = {"documents": None, **self._special_tokens, **_plain(template_options)}
        variables |= {
            "messages": [_with_reasoning(message) for message in talk],
            "tools": _plain(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._render(variables)
        return _cut_at_mark(text, final) if continue_final_message else text

    def _render(self, variables: Mapping[str, Any]) -> str:
        if self._template is None:
            self._template = _compile(self.source)
        try:
            return self._template.render(variables)
        except Exception as error:  # the template is foreign code: whatever it raises, it refuses these messages
            raise InvalidParameter(f"The chat template refuses these messages: {error}", "messages") from error


def _check_options(options: Mapping[str, Any], add_generation_prompt: bool, continue_final_message: object) -> None:
    taken = sorted(RESERVED & options.keys())
    if taken:
        message = f"chat_template_kwargs must not set {', '.join(taken)}; the server does."
        raise InvalidParameter(message, "chat_template_kwargs")
    if not isinstance(continue_final_message, bool):
        message = f"continue_final_message must be true or false, got {continue_final_message!r}."
        raise InvalidParameter(message, "continue_final_message")
    if continue_final_message and add_generation_prompt:
        message = "continue_final_message goes on with the last message, so set add_generation_prompt to false."
        raise InvalidParameter(message, "continue_final_message")


def _checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copy the messages into plain data."""
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        message = "messages must be a list of at least one object with role and content."
        raise InvalidParameter(message, "messages")
    return [_plain(message) for message in messages]


def _mark_end(message: dict[str, Any]) -> str:
    """Append the tag to a message's text, or to its last part that has one; return that text."""
    content = message.get("content")
    parts = [part for part in content if isinstance(part, dict) and "text" in part] if isinstance(content, list) else []
    holder, key = (parts[-1], "text") if parts else (message, "content")
    text = holder.get(key)
    if not isinstance(text, str):
        raise InvalidParameter("continue_final_message needs a last message with text to go on with.", "messages")
    holder[key] = text + TAG
    return text


def _cut_at_mark(rendered: str, final: str) -> str:
    """Return the text up to the tag; without the spaces before it if the template trims messages."""
    if TAG.strip() not in rendered or final.strip() not in rendered:
        raise InvalidParameter("The chat template leaves the last message out, so it cannot be continued.", "messages")
    before, found, after = rendered.rpartition(TAG.strip())
    return before if (found + after).startswith(TAG) else before.rstrip()


def _plain(value: Any) -> Any:
    """Copy into JSON's own types, so that a template finds no methods to call; other objects are named only."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if callable(getattr(value, "model_dump", None)):  # a pydantic model
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Give a message's reasoning under every name that templates read."""
    reasoning = next((message[name] for name in REASONING_FIELDS if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _compile(source: str) -> Template:
    from jinja2 import TemplateSyntaxError

    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"The chat template is not valid Jinja: line {error.lineno}: {error}. Start with --chat-template FILE."
        ) from error


def _environment() -> Environment:
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def _generation_tag() -> type[Extension]:
    """The tag {% generation %}: marks the assistant's words for training; here its body is rendered as it stands."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return GenerationTag


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own tojson escapes HTML, which a prompt must not have."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)  # noqa: DTZ005 - local time without a zone, as in transformers
