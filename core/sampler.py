"""Sampler: the logits of one step -> one token for each row. Knows nothing of models, blocks or scheduling.

A row goes through these, in this order; what a request does not ask for is skipped:

    allowed_token_ids > bad_words > min_tokens (bans end-of-sequence and stop tokens) > logit_bias
    > repetition_penalty > presence and frequency penalty > temperature > top_k > top_p > min_p > draw

Every filter after temperature keeps a prefix of the tokens sorted by logit, ties by lowest id, so the order in which
equal logits happen to be sorted never shows. A row depends on its own logits, its request and
`uniform(request.seed, number of the output token)` only: not on the batch, not on preemption. On a GPU a kernel draws,
and the tokens are all that the host waits for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.contracts import Tokenizer
from core.device import DeviceModule, HostDevice
from core.errors import InvalidParameter
from core.outputs import TokenLogprobs
from core.request import Request
from core.sampling.draw import draw, is_filtered, parts_of, uniform
from core.sampling.edits import Edits, RowState
from core.sampling.logprobs import token_logprobs
from core.sampling_params import SamplingParams

NOT_FINITE = "The model's logits for this token are NaN or infinite; its weights or its dtype do not fit."
NOTHING_LEFT = (
    "No token is left to choose: allowed_token_ids, bad_words, min_tokens and logit_bias exclude them all, "
    "or a bias or penalty is too large for float32."
)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of one row. A row that cannot be sampled has `failed`, and the other rows are not touched."""

    token_id: int  # -1 if failed
    logprobs: TokenLogprobs | None = None  # of the model's own distribution, before penalties and temperature
    failed: str | None = None  # why there is no token; the request should end with it


class Sampler:
    """Chooses tokens. Keeps what a request needs from step to step until `release`."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int] = (), module: DeviceModule | None = None) -> None:
        self.vocab_size = vocab_size  # width of the logits
        self.module = module or HostDevice()
        self.device = self.module.device  # where the work is done; logits from elsewhere are moved
        self._eos = [token for token in eos_token_ids if 0 <= token < vocab_size]
        self._states: dict[str, RowState] = {}

    def add(self, request: Request, bad_word_ids: Sequence[Sequence[int]] = ()) -> None:
        """Prepare for a request, at admission. Raises InvalidParameter if it names a token that does not exist."""
        check_token_ids(request.params, self.vocab_size)
        assert bad_word_ids or not request.params.bad_words, "bad_words were not turned into token ids"
        reachable = [list(ids) for ids in bad_word_ids if ids and max(ids) < self.vocab_size]
        self._states[request.id] = RowState(request, reachable, self._eos, self.vocab_size)

    def release(self, request_id: str) -> None:
        """Forget a finished or aborted request, not a preempted one. Unknown ids are fine."""
        self._states.pop(request_id, None)

    def sample(self, logits: Tensor, rows: Sequence[Request], ahead: Sequence[int] | None = None) -> list[SampledToken]:
        """Choose the next token of each of `rows`; logits [rows, vocab], any float dtype, are not changed.

        `ahead` [rows]: how many draft tokens stand between a request's output and the token to choose; None = none.
        """
        assert logits.shape == (len(rows), self.vocab_size), (logits.shape, len(rows), self.vocab_size)
        ahead = ahead or [0] * len(rows)
        if not rows:
            return []
        logits = logits.to(self.device)
        scores = self._edited(logits, rows)
        plain = not self.module.stages and scores.dtype is torch.float32
        if plain and all(request.params.greedy for request in rows):
            return self._results(logits, rows, *_largest_finite(scores))
        best, tokens = largest(scores)
        if self.module.stages:
            return self._results(logits, rows, *self._read(scores, best, tokens, rows, ahead))
        finite = [math.isfinite(score) for score in best.tolist()]
        drawn = [row for row, request in enumerate(rows) if finite[row] and not request.params.greedy]
        for filtered in (False, True):
            group = [row for row in drawn if is_filtered(rows[row].params) is filtered]
            for part in parts_of(group, self.vocab_size):
                numbers = [uniform(rows[row].seed, len(rows[row].output_ids) + ahead[row]) for row in part]
                tokens[part] = draw(scores, best, part, [rows[row].params for row in part], numbers, filtered)
        return self._results(logits, rows, tokens.tolist(), finite)

    def _read(
        self, scores: Tensor, best: Tensor, tokens: Tensor, rows: Sequence[Request], ahead: Sequence[int]
    ) -> tuple[list[int], list[bool]]:
        """Return each row's token and whether it is one; waits for the device once."""
        if not all(request.params.greedy for request in rows):
            from core.sampling.on_device import draw_on_device  # imports Triton

            tokens = draw_on_device(scores, rows, ahead, self.module)
        chosen, finite = self.module.read(torch.stack([tokens, best.isfinite().long()])).tolist()
        return chosen, [bool(flag) for flag in finite]

    def prompt_logprobs(self, logits: Tensor, token_ids: Sequence[int], k: int) -> list[TokenLogprobs]:
        """Return the logprobs of known tokens: logits [rows, vocab] predict token_ids [rows]."""
        assert logits.shape == (len(token_ids), self.vocab_size), (logits.shape, len(token_ids), self.vocab_size)
        return token_logprobs(logits.to(self.device), token_ids, [k] * len(token_ids))

    def _state(self, request: Request) -> RowState:
        if request.id not in self._states:
            self.add(request)
        return self._states[request.id]

    def _edited(self, logits: Tensor, rows: Sequence[Request]) -> Tensor:
        """Return the logits after masks, bias and penalties: a float32 copy, or `logits` if no row asks for any."""
        edits = Edits(self.vocab_size)
        for row, request in enumerate(rows):
            self._state(request).collect(row, request, edits)
        return edits.apply(logits, self.module)

    def _results(
        self, logits: Tensor, rows: Sequence[Request], tokens: list[int], finite: list[bool]
    ) -> list[SampledToken]:
        asked = [row for row, request in enumerate(rows) if finite[row] and request.params.logprobs is not None]
        counts = [rows[row].params.logprobs or 0 for row in asked]
        found = token_logprobs(logits[asked], [tokens[row] for row in asked], counts) if asked else []
        logprobs = dict(zip(asked, found, strict=True))
        return [
            SampledToken(token, logprobs.get(row)) if finite[row] else SampledToken(-1, failed=_why(logits[row]))
            for row, token in enumerate(tokens)
        ]


def largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's highest score and its id: the lowest of equal ones; NaN, where there is one in the row."""
    if scores.device.type != "cpu" or scores.dtype is not torch.float32:
        best, tokens = scores.max(dim=-1)
        return best, tokens
    tokens = torch.from_numpy(scores.numpy().argmax(-1))  # in vectors, where torch goes number by number
    return scores.gather(-1, tokens[:, None]).squeeze(-1), tokens


def _largest_finite(scores: Tensor) -> tuple[list[int], list[bool]]:
    """Return what `largest` finds on a CPU, and whether it is finite, without tensors, which cost microseconds."""
    values = scores.numpy()
    tokens = values.argmax(-1)
    return tokens.tolist(), np.isfinite(values[np.arange(len(values)), tokens]).tolist()


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidParameter, naming the field, if a token id of the request is outside the vocabulary."""
    named: tuple[tuple[str, Iterable[int]], ...] = (
        ("logit_bias", params.logit_bias),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("stop_token_ids", params.stop_token_ids),
    )
    for name, ids in named:
        for token in ids:
            if not 0 <= token < vocab_size:
                message = f"{name} holds token id {token}, but this model's ids are 0 to {vocab_size - 1}. Remove it."
                raise InvalidParameter(message, name)


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """Return the token sequences that spell the words, at the start of a text and after a space."""
    found: list[list[int]] = []
    for word in words:
        bare = word.lstrip() or word  # a word of nothing but space is meant as it stands
        variants = [tokenizer.encode(text, add_special_tokens=False) for text in (bare, " " + bare)]
        if not any(variants):
            raise InvalidParameter(f"bad_words holds {word!r}, which has no tokens. Remove it.", "bad_words")
        found += [ids for ids in variants if ids and ids not in found]
    return found


def _why(logits: Tensor) -> str:
    return NOTHING_LEFT if logits.max().isfinite() else NOT_FINITE
