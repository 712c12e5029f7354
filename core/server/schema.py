"""What request bodies share: closed schemas, sampling fields, and the way from bytes to a checked object.

A field that core-serve does not know or cannot do yet is refused by its name, unless its value asks for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import Request

from core.engine_info import EngineInfo
from core.errors import InvalidParameter, ModelNotFound
from core.server.errors import HttpError

INT32 = 2**31 - 1
Int = Annotated[int, Field(ge=-INT32, le=INT32)]  # a larger one fits no tensor
B = TypeVar("B", bound="Body")
C = TypeVar("C", bound="Closed")


class Closed(BaseModel):
    """No unknown fields, no conversions: "5" is not 5."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Body(Closed):
    """A request body. `unsupported`: fields that cannot be served, each with the values that ask for nothing."""

    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {}
    model: str | None = None


class SamplingFields(Closed):
    """Fields of SamplingParams that keep their name, in every API; null means the default."""

    n: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Any = None  # SamplingParams checks lists
    stop_token_ids: list[Int] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[Int] | None = None
    logit_bias: dict[str, float] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Int | None = None
    skip_special_tokens: bool | None = None


class StreamOptions(Closed):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers who measure lengths; refused when true


class ExtraFields(Closed):
    """Fields of both completion APIs besides sampling."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Int | None = None
    priority: Int | None = None
    user: str | None = None  # accepted, not used: OpenAI's bookkeeping
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


async def read_body(request: Request, schema: type[B]) -> B:
    """Return the checked body of a request. Raises RequestError naming the field at fault."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        found = repr(kind) if kind else "none"
        raise HttpError(415, f"The Content-Type must be application/json, got {found}.", code="unsupported_media_type")
    return parse(await request.body(), schema)


def parse(body: bytes, schema: type[B]) -> B:
    """Return `body` as a checked object. Raises InvalidParameter."""
    try:
        fields = from_json(body)
    except ValueError as error:
        raise InvalidParameter(f"The body is not valid JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise InvalidParameter(f"The body must be a JSON object, got {_kind(fields)}.")
    return checked(without_harmless(fields, schema.unsupported), schema)


def checked(fields: dict[str, Any], schema: type[C]) -> C:
    """Return `fields` as an object of `schema`. Raises InvalidParameter naming the first field at fault."""
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0], schema) from None


def without_harmless(fields: dict[str, Any], unsupported: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Drop unsupported fields whose value asks for nothing; refuse the others."""
    for name in sorted(fields.keys() & unsupported.keys()):
        harmless = unsupported[name]
        if not any(type(fields[name]) is type(value) and fields[name] == value for value in harmless):
            shown = ", ".join("null" if value is None else json.dumps(value) for value in harmless)
            raise InvalidParameter(f"{name} is not supported yet. Leave it out (or send one of: {shown}).", name)
    return {name: value for name, value in fields.items() if name not in unsupported}


def _refusal(found: ErrorDetails, schema: type[Closed]) -> InvalidParameter:
    """Say what pydantic found, in our words where theirs do not help."""
    param = _path(found["loc"])
    if found["type"] == "extra_forbidden":
        near = get_close_matches(str(found["loc"][-1]), schema.model_fields, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return InvalidParameter(f"Unknown field {param!r}.{hint}", param)
    if found["type"] == "missing":
        return InvalidParameter(f"The field {param!r} is missing.", param)
    message = found["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return InvalidParameter(f"{param} {message}, got {_short(found['input'])}.", param)


def _path(location: Sequence[int | str]) -> str:
    """("messages", 0, "content") -> messages[0].content."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "a very long number"
    return text if len(text) <= 80 else text[:77] + "..."


def check_model(asked: str | None, info: EngineInfo) -> None:
    """Raise ModelNotFound unless `asked` is what is served, or nothing."""
    if asked is not None and asked != info.model_name:
        message = f"The model {_short(asked)} does not exist here; this server has {info.model_name!r}."
        raise ModelNotFound(message, "model")
