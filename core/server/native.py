"""POST /generate, in SGLang's shape: text or input_ids, sampling_params; streamed events hold all text so far."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from core.engine_info import EngineInfo
from core.errors import InvalidParameter, RequestError
from core.outputs import Delta, TokenLogprobs
from core.request import ClientRequest
from core.sampling_params import SamplingParams
from core.server.client import EngineClient
from core.server.codec import Codec
from core.server.collect import Collected, Collector
from core.server.errors import renamed
from core.server.logprobs import best, finite
from core.server.params import make_params
from core.server.prompts import prompt_ids, split_prompts
from core.server.schema import Body, Int, SamplingFields, checked, read_body, without_harmless
from core.server.stream import Event, respond

DEFAULT_MAX_TOKENS = 128  # SGLang's


class NativeParams(SamplingFields):
    """sampling_params of /generate."""

    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {
        "json_schema": (None,),
        "regex": (None,),
        "ebnf": (None,),
        "structural_tag": (None,),
        "custom_params": (None,),
        "stop_regex": (None,),
        "spaces_between_special_tokens": (None, True),
    }

    max_new_tokens: int | None = None
    min_new_tokens: Int | None = None
    no_stop_trim: bool | None = None
    sampling_seed: int | None = None


class GenerateRequest(Body):
    """POST /generate."""

    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {
        "input_embeds": (None,),
        "image_data": (None, []),
        "audio_data": (None, []),
        "video_data": (None, []),
        "lora_path": (None,),
        "session_params": (None,),
        "return_hidden_states": (None, False),
        "token_ids_logprob": (None, []),
    }

    text: Any = None
    input_ids: Any = None
    sampling_params: Any = None  # an object, or a list with one for each prompt
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: Int = -1  # prompt position from which logprobs are wanted; -1 = the answer's only
    top_logprobs_num: Int = 0
    return_text_in_logprobs: bool = False
    rid: str | None = None
    priority: Int | None = None


@dataclass(frozen=True)
class Wish:
    """What of a request's answer the body asked to see."""

    batched: bool  # the answer is a list
    logprobs: bool
    start: int  # prompt position of the first logprob; -1 = none
    top: int
    with_text: bool


def generate_routes(client: EngineClient) -> APIRouter:
    router = APIRouter()

    @router.post("/generate")
    async def generate(http: Request) -> Response:
        info = client.require_ready()
        body = await read_body(http, GenerateRequest)
        try:
            requests, batched = await make_requests(body, client.codec, info)
            top = body.top_logprobs_num
            wish = Wish(batched, body.return_logprob, body.logprob_start_len, top, body.return_text_in_logprobs)
            answer = NativeAnswer(requests, wish, client.codec)
            return await respond(http, client, requests, answer, body.stream)
        except RequestError as error:
            raise renamed(error, _names(body)) from error

    return router


def _names(body: GenerateRequest) -> dict[str, str]:
    names = {
        "prompt": "input_ids" if body.text is None else "text",
        "max_tokens": "sampling_params.max_new_tokens",
        "min_tokens": "sampling_params.min_new_tokens",
        "logprobs": "top_logprobs_num",
        "prompt_logprobs": "logprob_start_len",
    }
    for name in SamplingFields.model_fields:
        names.setdefault(name, f"sampling_params.{name}")
    return names


async def make_requests(body: GenerateRequest, codec: Codec, info: EngineInfo) -> tuple[list[ClientRequest], bool]:
    """Return one request for each prompt, and whether the answer is a list. Raises RequestError."""
    if (body.text is None) == (body.input_ids is None):
        raise InvalidParameter("Send either text or input_ids.", "text")
    given, param = (body.input_ids, "input_ids") if body.text is None else (body.text, "text")
    prompts = split_prompts(given, param)
    if isinstance(prompts[0], str) != (param == "text"):
        raise InvalidParameter(f"{param} must hold {'strings' if param == 'text' else 'token ids'}.", param)
    several = isinstance(given, list) and not isinstance(given[0], int)
    ids = await prompt_ids(prompts, codec, info)
    params = [make_native_params(one, body, info) for one in _each(body.sampling_params, len(ids))]
    name = body.rid or f"gen-{uuid.uuid4().hex}"
    requests = [
        ClientRequest(f"{name}-{index}" if several else name, one, chosen, body.priority or 0)
        for index, (one, chosen) in enumerate(zip(ids, params, strict=True))
    ]
    return requests, several or params[0].n > 1


def _each(given: Any, count: int) -> list[dict[str, Any]]:
    """One set of params for all prompts, or one for each."""
    many = given if isinstance(given, list) else [given or {}]
    if not all(isinstance(one, dict) for one in many):
        raise InvalidParameter("sampling_params must be an object, or a list of objects.", "sampling_params")
    if isinstance(given, list) and len(given) != count:
        message = f"sampling_params holds {len(given)} entries for {count} prompts; send one, or one for each."
        raise InvalidParameter(message, "sampling_params")
    return many if isinstance(given, list) else many * count


def make_native_params(given: dict[str, Any], body: GenerateRequest, info: EngineInfo) -> SamplingParams:
    fields = check_params(given)
    if body.logprob_start_len < -1:
        message = f"logprob_start_len must be at least -1, got {body.logprob_start_len}."
        raise InvalidParameter(message, "logprob_start_len")
    wants_prompt = body.return_logprob and body.logprob_start_len >= 0
    fields.seed = fields.sampling_seed if fields.seed is None else fields.seed
    fields.min_tokens = fields.min_new_tokens if fields.min_tokens is None else fields.min_tokens
    if fields.no_stop_trim is not None:
        fields.include_stop_str_in_output = fields.no_stop_trim
    return make_params(
        fields,
        info.vocab_size,
        max_tokens=DEFAULT_MAX_TOKENS if fields.max_new_tokens is None else fields.max_new_tokens,
        logprobs=body.top_logprobs_num if body.return_logprob else None,
        prompt_logprobs=body.top_logprobs_num if wants_prompt else None,
    )


def check_params(given: dict[str, Any]) -> NativeParams:
    """Return sampling_params as an object. Raises InvalidParameter naming the field."""
    try:
        return checked(without_harmless(given, NativeParams.unsupported), NativeParams)
    except InvalidParameter as error:
        error.param = f"sampling_params.{error.param}"
        raise


class NativeAnswer:
    """{"text", "output_ids", "meta_info"}; in a stream, all that a sample has so far."""

    def __init__(self, requests: Sequence[ClientRequest], wish: Wish, codec: Codec) -> None:
        self.collector = Collector(requests)
        self.positions = {id(sample): index for index, sample in enumerate(self.collector.samples)}
        self.wish, self.codec = wish, codec
        self.start = time.monotonic()

    def full(self, samples: Sequence[Collected]) -> Any:
        shown = [self._show(sample) for sample in samples]
        return shown if self.wish.batched else shown[0]

    def first(self) -> Iterable[Event]:
        return ()

    def events(self, delta: Delta) -> Iterable[Event]:
        sample = self.collector.take(delta)
        shown = self._show(sample)
        if self.wish.batched:
            shown["index"] = self.positions[id(sample)]
        yield shown

    def last(self) -> Iterable[Event]:
        return ()

    # ------------------------------------------------------------------------------------------ one sample

    def _show(self, sample: Collected) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": sample.request.id,
            "finish_reason": finish(sample),
            "prompt_tokens": len(sample.request.prompt_ids),
            "completion_tokens": len(sample.token_ids),
            "cached_tokens": sample.num_cached,
            "e2e_latency": time.monotonic() - self.start,
        }
        if self.wish.logprobs:
            meta |= self._logprobs("output", sample.token_ids, sample.logprobs)
        if self.wish.logprobs and sample.prompt_logprobs is not None and self.wish.start >= 0:
            start = self.wish.start
            meta |= self._logprobs("input", sample.request.prompt_ids[start:], sample.prompt_logprobs[start:])
        return {"text": sample.text, "output_ids": sample.token_ids, "meta_info": meta}

    def _logprobs(self, kind: str, ids: Sequence[int], found: Sequence[TokenLogprobs | None]) -> dict[str, list[Any]]:
        """[logprob, id, text] of each token; with top_logprobs_num also a list of such for its rivals."""
        pairs = list(zip(ids, found, strict=True))
        made: dict[str, list[Any]] = {
            f"{kind}_token_logprobs": [
                self._triple(token_id, None if entries is None else entries[token_id].logprob)
                for token_id, entries in pairs
            ]
        }
        if self.wish.top > 0:
            made[f"{kind}_top_logprobs"] = [
                None if entries is None else [self._triple(t, e.logprob) for t, e in best(entries, self.wish.top)]
                for _, entries in pairs
            ]
        return made

    def _triple(self, token_id: int, logprob: float | None) -> tuple[float | None, int, str | None]:
        text = self.codec.token_text(token_id) if self.wish.with_text else None
        return None if logprob is None else finite(logprob), token_id, text


def finish(sample: Collected) -> dict[str, Any] | None:
    """SGLang tells what matched; null while the sample runs."""
    if sample.finish_reason == "length":
        return {"type": "length", "length": len(sample.token_ids)}
    if sample.finish_reason == "stop":
        matched = sample.stop_reason
        if matched is None and sample.token_ids:
            matched = sample.token_ids[-1]  # the end-of-sequence token
        return {"type": "stop", "matched": matched}
    return None if sample.finish_reason is None else {"type": sample.finish_reason}
