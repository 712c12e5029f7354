"""SamplingParams: how the tokens of one request are chosen. Plain data, checked when made; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from core.errors import InvalidParameter

MAX_LOGPROBS = 100
MAX_SEED = 2**63 - 1


def _sequence(name: str, value: Any) -> list[Any]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if not isinstance(value, Sequence):
        raise InvalidParameter(f"{name} must be a list, got {value!r}.", name)
    return list(value)


@dataclass(frozen=True)
class SamplingParams:
    """Field names are vLLM's. Raises InvalidParameter naming the field when a value is out of range."""

    n: int = 1
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # in (0, 1]
    top_k: int = 0  # 0 or -1 = all tokens
    min_p: float = 0.0  # in [0, 1], relative to the most likely token
    repetition_penalty: float = 1.0  # > 0; over prompt and output (Keskar et al. 2019, CTRL)
    presence_penalty: float = 0.0  # in [-2, 2]; over output
    frequency_penalty: float = 0.0  # in [-2, 2]; over output
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit
    allowed_token_ids: Sequence[int] | None = None  # all others are never chosen
    bad_words: Sequence[str] = ()  # texts that never appear in the output; needs a tokenizer
    seed: int | None = None  # the same seed gives the same tokens, whatever else runs
    stop: Sequence[str] = ()  # needs a tokenizer
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0  # no stop before so many tokens
    max_tokens: int | None = None  # None = up to the model's length
    logprobs: int | None = None  # k = the chosen token's and the k best; None = none
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("bad_words", "stop", "stop_token_ids"):
            object.__setattr__(self, name, tuple(_sequence(name, getattr(self, name) or ())))
        if self.allowed_token_ids is not None:
            ids = tuple(_sequence("allowed_token_ids", self.allowed_token_ids))
            object.__setattr__(self, "allowed_token_ids", ids)
        self._check_types()
        self._check_ranges()

    def _check_types(self) -> None:
        integers = ("n", "top_k", "min_tokens", "max_tokens", "seed", "logprobs", "prompt_logprobs")
        numbers = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        for name in integers:
            value = getattr(self, name)
            optional = name in ("max_tokens", "seed", "logprobs", "prompt_logprobs")
            if (value is None and optional) or (isinstance(value, int) and not isinstance(value, bool)):
                continue
            raise InvalidParameter(f"{name} must be an integer, got {value!r}.", name)
        for name in numbers:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InvalidParameter(f"{name} must be a finite number, got {value!r}.", name)
        for name, kind in (("stop", str), ("bad_words", str), ("stop_token_ids", int), ("allowed_token_ids", int)):
            for item in getattr(self, name) or ():
                if not isinstance(item, kind) or isinstance(item, bool) or item == "":
                    raise InvalidParameter(f"{name} holds {item!r}, which is not a usable {kind.__name__}.", name)
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or isinstance(bias, bool) or not isinstance(bias, (int, float)):
                raise InvalidParameter(
                    f"logit_bias must map token ids to numbers, got {token!r}: {bias!r}.", "logit_bias"
                )
            if math.isnan(bias) or bias == math.inf:
                raise InvalidParameter(f"logit_bias of token {token} must not be {bias}.", "logit_bias")

    def _check_ranges(self) -> None:
        checks = [
            ("n", 1 <= self.n <= 128, "be in [1, 128]"),
            ("temperature", 0 <= self.temperature <= 100, "be in [0, 100]"),
            ("top_p", 0 < self.top_p <= 1, "be in (0, 1]"),
            ("top_k", self.top_k >= -1, "be -1 or 0 (all) or positive"),
            ("min_p", 0 <= self.min_p <= 1, "be in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "be positive"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "be in [-2, 2]"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "be in [-2, 2]"),
            ("seed", self.seed is None or abs(self.seed) <= MAX_SEED, "fit in 64 bits"),
            ("min_tokens", self.min_tokens >= 0, "not be negative"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "be at least 1"),
            ("min_tokens", self.max_tokens is None or self.min_tokens <= self.max_tokens, "not exceed max_tokens"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"be in [0, {MAX_LOGPROBS}]"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_LOGPROBS,
                f"be in [0, {MAX_LOGPROBS}]",
            ),
            ("allowed_token_ids", self.allowed_token_ids is None or len(self.allowed_token_ids) > 0, "not be empty"),
        ]
        for name, holds, rule in checks:
            if not holds:
                raise InvalidParameter(f"{name} must {rule}, got {getattr(self, name)}.", name)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def only_highest(self) -> bool:
        """True if nothing about a token's logits is asked but which one is the highest."""
        edited = self.logit_bias or self.allowed_token_ids or self.bad_words or self.min_tokens
        penalized = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        shown = self.logprobs is not None or self.prompt_logprobs is not None
        return self.greedy and not (edited or penalized or shown)

    def with_changes(self, **changes: Any) -> SamplingParams:
        """Return a copy with some fields changed, checked again."""
        return replace(self, **changes)

    @classmethod
    def field_names(cls) -> frozenset[str]:
        return frozenset(entry.name for entry in fields(cls))
