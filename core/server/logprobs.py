"""Logprobs in the shape of each API."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from core.outputs import Logprob, TokenLogprobs
from core.server.codec import Codec

LOWEST = -9999.0  # JSON has no minus infinity


def finite(value: float) -> float:
    """Return a number that JSON can hold."""
    return LOWEST if math.isnan(value) else max(value, LOWEST)


def best(found: TokenLogprobs, count: int) -> list[tuple[int, Logprob]]:
    """Return the `count` most likely entries, best first; the chosen token may be one more that is not among them."""
    return sorted(found.items(), key=lambda entry: (-finite(entry[1].logprob), entry[1].rank or 0))[:count]


# ---------------------------------------------------------------------------------------------- chat


def chat_logprobs(token_ids: Sequence[int], found: Sequence[TokenLogprobs], top: int, codec: Codec) -> dict[str, Any]:
    """{"content": [{token, logprob, bytes, top_logprobs}]}."""
    content = []
    for token_id, entries in zip(token_ids, found, strict=True):
        shown = _chat_token(token_id, entries[token_id].logprob, codec)
        shown["top_logprobs"] = [_chat_token(other, entry.logprob, codec) for other, entry in best(entries, top)]
        content.append(shown)
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, logprob: float, codec: Codec) -> dict[str, Any]:
    return {"token": codec.token_text(token_id), "logprob": finite(logprob), "bytes": codec.token_bytes(token_id)}


# ---------------------------------------------------------------------------------------------- completions


class TextLogprobs:
    """{tokens, token_logprobs, top_logprobs, text_offset} of one choice, step by step: offsets go on."""

    def __init__(self, top: int, codec: Codec) -> None:
        self.top, self.codec = top, codec
        self.offset = 0  # characters of the choice's text before the next token

    def take(self, token_ids: Sequence[int], found: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """Return the entry for the next tokens; None stands for the first prompt token, which nothing predicts."""
        offsets = [self._advance(token_id) for token_id in token_ids]
        chosen = [
            None if entries is None else finite(entries[token_id].logprob)
            for token_id, entries in zip(token_ids, found, strict=True)
        ]
        return {
            "tokens": [self.codec.token_name(token_id) for token_id in token_ids],
            "token_logprobs": chosen,
            "top_logprobs": [self._top(entries) for entries in found],
            "text_offset": offsets,
        }

    def _advance(self, token_id: int) -> int:
        """Exact but for characters that are split over tokens: each part counts."""
        start = self.offset
        self.offset += len(self.codec.token_text(token_id))
        return start

    def _top(self, entries: TokenLogprobs | None) -> dict[str, float] | None:
        """The best `top` and, as OpenAI's, the chosen token even if it is not among them."""
        if entries is None:
            return None
        shown = best(entries, self.top)
        chosen = next(iter(entries.items()))
        if chosen[0] not in dict(shown):
            shown.append(chosen)
        return {self.codec.token_name(token_id): finite(entry.logprob) for token_id, entry in shown}


def join(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put the entries of several steps after one another."""
    return {name: [item for part in parts for item in part[name]] for name in parts[0]}


# ---------------------------------------------------------------------------------------------- prompt_logprobs


def prompt_entries(found: Sequence[TokenLogprobs | None], codec: Codec) -> list[dict[str, Any] | None]:
    """vLLM's shape: for each prompt token {id: {logprob, rank, decoded_token}}, null for the first."""
    return [None if entries is None else _by_id(entries, codec) for entries in found]


def _by_id(entries: TokenLogprobs, codec: Codec) -> dict[str, Any]:
    return {
        str(token_id): {
            "logprob": finite(entry.logprob),
            "rank": entry.rank,
            "decoded_token": codec.token_text(token_id),
        }
        for token_id, entry in entries.items()
    }
