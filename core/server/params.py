"""Body fields -> SamplingParams."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from core.errors import InvalidParameter
from core.sampling_params import SamplingParams
from core.server.schema import SamplingFields

MAX_BIAS = 100.0  # as OpenAI's; far larger ones overflow half types


def make_params(fields: SamplingFields, vocab_size: int, **others: Any) -> SamplingParams:
    """Return the params of a body; `others` are those whose names differ between the APIs. None means the default."""
    given = {name: getattr(fields, name) for name in SamplingFields.model_fields if name != "logit_bias"}
    wanted = {name: value for name, value in {**given, **others}.items() if value is not None}
    if fields.logit_bias:
        wanted["logit_bias"] = read_bias(fields.logit_bias)
    params = SamplingParams(**wanted)
    check_ids(params.stop_token_ids, vocab_size, "stop_token_ids")
    check_ids(params.allowed_token_ids or (), vocab_size, "allowed_token_ids")
    check_ids(params.logit_bias, vocab_size, "logit_bias")
    return params


def read_bias(given: Mapping[str, float]) -> dict[int, float]:
    """JSON has string keys only: {"50256": -100} -> {50256: -100.0}."""
    found: dict[int, float] = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidParameter(f"logit_bias must map token ids to numbers, got the key {key!r}.", "logit_bias")
        if abs(bias) > MAX_BIAS:
            raise InvalidParameter(f"logit_bias of token {key} must be in [-100, 100], got {bias}.", "logit_bias")
        found[int(key)] = float(bias)
    return found


def check_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    """Raise InvalidParameter if one is no token id of this model."""
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            message = f"{param} holds {token_id}, which is no token id; this model's are 0 to {vocab_size - 1}."
            raise InvalidParameter(message, param)
