"""Sampler: the logits of one step -> one token for each row. Knows nothing of models, blocks or scheduling.

A row goes through these, in this order; what a request does not ask for is skipped:

    allowed_token_ids > bad_words > min_tokens (bans end-of-sequence and stop tokens) > logit_bias
    > repetition_penalty > presence and frequency penalty > temperature > top_k > top_p > min_p > draw

Every filter after temperature keeps a prefix of the tokens sorted by logit, ties by lowest id, so the order in which
equal logits happen to be sorted never shows. A row depends on its own logits, its request and
`uniform(request.seed, len(request.output_ids))` only: not on the batch, not on preemption.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.contracts import Tokenizer
from core.errors import InvalidParameter
from core.outputs import Logprob, TokenLogprobs
from core.request import Request
from core.sampling_params import SamplingParams

Ids = NDArray[np.int64]

NOT_FINITE = "The model's logits for this token are NaN or infinite; its weights or its dtype do not fit."
NOTHING_LEFT = (
    "No token is left to choose: allowed_token_ids, bad_words, min_tokens and logit_bias exclude them all, "
    "or a bias or penalty is too large for float32."
)

_CHUNK = 2**22  # logits worked on at a time, so that temporary tensors stay small
_SPAN = 256  # tokens whose probabilities are added up before the draw looks at single ones
_WIDTHS = (64, 1024, 16384)  # sorted candidates tried before the whole vocabulary is sorted
_COLDEST = 1e-6  # below this temperature only equal logits keep a weight in float32
_FLOAT32 = torch.finfo(torch.float32)
_MASK64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of one row. A row that cannot be sampled has `failed`, and the other rows are not touched."""

    token_id: int  # -1 if failed
    logprobs: TokenLogprobs | None = None  # of the model's own distribution, before penalties and temperature
    failed: str | None = None  # why there is no token; the request should end with it


class Sampler:
    """Chooses tokens. Keeps what a request needs from step to step until `release`."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int] = (), device: torch.device | str = "cpu") -> None:
        self.vocab_size = vocab_size  # width of the logits
        self.device = torch.device(device)  # where the work is done; logits from elsewhere are moved
        self._eos = [token for token in eos_token_ids if 0 <= token < vocab_size]
        self._states: dict[str, _State] = {}

    def add(self, request: Request, bad_word_ids: Sequence[Sequence[int]] = ()) -> None:
        """Prepare for a request, at admission. Raises InvalidParameter if it names a token that does not exist."""
        check_token_ids(request.params, self.vocab_size)
        assert bad_word_ids or not request.params.bad_words, "bad_words were not turned into token ids"
        reachable = [list(ids) for ids in bad_word_ids if ids and max(ids) < self.vocab_size]
        self._states[request.id] = _State(request, reachable, self._eos, self.vocab_size)

    def release(self, request_id: str) -> None:
        """Forget a finished or aborted request, not a preempted one. Unknown ids are fine."""
        self._states.pop(request_id, None)

    def sample(self, logits: Tensor, rows: Sequence[Request]) -> list[SampledToken]:
        """Choose the next token of each of `rows`; logits [rows, vocab], any float dtype, are not changed."""
        assert logits.shape == (len(rows), self.vocab_size), (logits.shape, len(rows), self.vocab_size)
        if not rows:
            return []
        logits = logits.to(self.device)
        scores = self._edited(logits, rows)
        best, tokens = scores.max(dim=-1)  # the lowest id of equal ones; NaN if there is one in the row
        finite = best.isfinite().tolist()
        drawn = [row for row, request in enumerate(rows) if finite[row] and not request.params.greedy]
        for filtered in (False, True):
            group = [row for row in drawn if _is_filtered(rows[row].params) is filtered]
            for part in _parts(group, self.vocab_size):
                tokens[part] = _draw(scores, best, part, [rows[row] for row in part], filtered)
        return self._results(logits, rows, tokens.tolist(), finite)

    def prompt_logprobs(self, logits: Tensor, token_ids: Sequence[int], k: int) -> list[TokenLogprobs]:
        """Return the logprobs of known tokens: logits [rows, vocab] predict token_ids [rows]."""
        assert logits.shape == (len(token_ids), self.vocab_size), (logits.shape, len(token_ids), self.vocab_size)
        return _logprobs(logits.to(self.device), token_ids, [k] * len(token_ids))

    def _state(self, request: Request) -> _State:
        if request.id not in self._states:
            self.add(request)
        return self._states[request.id]

    def _edited(self, logits: Tensor, rows: Sequence[Request]) -> Tensor:
        """Return the logits after masks, bias and penalties: a float32 copy, or `logits` if no row asks for any."""
        edits = _Edits(self.vocab_size)
        for row, request in enumerate(rows):
            self._state(request).collect(row, request, edits)
        return edits.apply(logits)

    def _results(
        self, logits: Tensor, rows: Sequence[Request], tokens: list[int], finite: list[bool]
    ) -> list[SampledToken]:
        asked = [row for row, request in enumerate(rows) if finite[row] and request.params.logprobs is not None]
        counts = [rows[row].params.logprobs or 0 for row in asked]
        found = _logprobs(logits[asked], [tokens[row] for row in asked], counts) if asked else []
        logprobs = dict(zip(asked, found, strict=True))
        return [
            SampledToken(token, logprobs.get(row)) if finite[row] else SampledToken(-1, failed=_why(logits[row]))
            for row, token in enumerate(tokens)
        ]


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


def uniform(seed: int, step: int) -> float:
    """Return the number in [0, 1) that draws token `step` of the stream `seed`.

    splitmix64 (Steele, Lea, Flood 2014) as a counter: no state to keep, so no order in which to ask.
    """
    mixed = _mix(_mix(seed) + (step + 1) * 0x9E3779B97F4A7C15)
    return float(mixed >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value &= _MASK64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK64
    return value ^ (value >> 31)


# ---------------------------------------------------------------------------------- masks, bias, penalties


class _TokenCounts:
    """The tokens that a request has seen and how often its output holds each; grows with the output."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = np.fromiter(self._places, np.int64, len(self._places))
        self._counts = np.zeros(len(self._places), np.float32)
        self._taken = 0  # output tokens counted so far

    def update(self, output_ids: Sequence[int]) -> tuple[Ids, NDArray[np.float32]]:
        """Count the output's new tokens; return all ids seen, and the output's count of each."""
        for token in output_ids[self._taken :]:
            self._count(token)
        self._taken = len(output_ids)
        return self._ids[: len(self._places)], self._counts[: len(self._places)]

    def _count(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            room = max(16, place)  # doubles
            self._ids = np.concatenate([self._ids, np.zeros(room, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, np.float32)])
        self._ids[place] = token
        self._counts[place] += 1


class _State:
    """What one request changes in its logits."""

    def __init__(self, request: Request, bad_words: list[list[int]], eos: list[int], vocab_size: int) -> None:
        params = request.params
        self._never = np.array([ids[0] for ids in bad_words if len(ids) == 1], np.int64)
        self._after = [(ids[:-1], ids[-1:]) for ids in bad_words if len(ids) > 1]
        self._ends = np.array([*eos, *params.stop_token_ids], np.int64)
        self._allowed = None if params.allowed_token_ids is None else np.array(params.allowed_token_ids, np.int64)
        self._bias_ids = np.array(list(params.logit_bias), np.int64)
        with np.errstate(over="ignore"):  # becomes infinite, and the row fails with NOTHING_LEFT
            self._bias = np.array(list(params.logit_bias.values()), np.float64).astype(np.float32)
        self._counts: _TokenCounts | None = None
        repeats = params.repetition_penalty != 1
        if repeats or params.presence_penalty or params.frequency_penalty:
            prompt = [token for token in request.prompt_ids if token < vocab_size] if repeats else []
            self._counts = _TokenCounts(prompt)

    def collect(self, row: int, request: Request, edits: _Edits) -> None:
        """Add this step's changes of the request's row."""
        params, output_ids = request.params, request.output_ids
        if self._allowed is not None:
            edits.allow(row, self._allowed)
        if len(self._never):
            edits.ban(row, self._never)
        for before, last in self._after:
            if output_ids[-len(before) :] == before:
                edits.ban(row, np.array(last, np.int64))
        if len(output_ids) < params.min_tokens:
            edits.ban(row, self._ends)
        if len(self._bias_ids):
            edits.bias(row, self._bias_ids, self._bias)
        if self._counts is not None:
            edits.penalise(row, *self._counts.update(output_ids), params)


@dataclass
class _Edits:
    """Changes to single logits of one step, gathered from all rows, then applied at once.

    Places are row * vocab + token id. Each list holds one array for each row that asks.
    """

    vocab_size: int
    allowed_rows: list[int] = field(default_factory=list)
    allowed: list[Ids] = field(default_factory=list)
    banned: list[Ids] = field(default_factory=list)
    biased: list[Ids] = field(default_factory=list)
    biases: list[NDArray[np.float32]] = field(default_factory=list)
    penalised: list[Ids] = field(default_factory=list)
    factors: list[NDArray[np.float32]] = field(default_factory=list)  # repetition penalties
    losses: list[NDArray[np.float32]] = field(default_factory=list)  # what presence and frequency take off

    def allow(self, row: int, ids: Ids) -> None:
        self.allowed_rows.append(row)
        self.allowed.append(row * self.vocab_size + ids)

    def ban(self, row: int, ids: Ids) -> None:
        self.banned.append(row * self.vocab_size + ids)

    def bias(self, row: int, ids: Ids, values: NDArray[np.float32]) -> None:
        self.biased.append(row * self.vocab_size + ids)
        self.biases.append(values)

    def penalise(self, row: int, ids: Ids, counts: NDArray[np.float32], params: SamplingParams) -> None:
        self.penalised.append(row * self.vocab_size + ids)
        factor = min(max(params.repetition_penalty, _FLOAT32.tiny), _FLOAT32.max)
        loss = params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
        self.factors.append(np.full(len(ids), factor, np.float32))
        self.losses.append(loss.astype(np.float32))

    def apply(self, logits: Tensor) -> Tensor:
        if not (self.allowed or self.banned or self.biased or self.penalised):
            return logits
        scores = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        flat, device = scores.view(-1), logits.device
        if self.allowed:
            places = _tensor(self.allowed, device)
            kept = flat[places]
            scores[self.allowed_rows] = -torch.inf
            flat[places] = kept
        if self.banned:
            flat[_tensor(self.banned, device)] = -torch.inf
        if self.biased:
            flat[_tensor(self.biased, device)] += _tensor(self.biases, device)
        if self.penalised:
            self._penalise(flat)
        return scores

    def _penalise(self, flat: Tensor) -> None:
        places, factor = _tensor(self.penalised, flat.device), _tensor(self.factors, flat.device)
        found = flat[places]
        found = torch.where(found > 0, found / factor, found * factor)
        flat[places] = found - _tensor(self.losses, flat.device)


def _tensor(parts: Sequence[NDArray[np.int64] | NDArray[np.float32]], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(device)


# ---------------------------------------------------------------------------------------------- drawing


def _is_filtered(params: SamplingParams) -> bool:
    """True if tokens must be sorted; min_p alone needs the best one only."""
    return params.top_k > 0 or params.top_p < 1


def _parts(rows: list[int], vocab_size: int) -> list[list[int]]:
    size = max(1, _CHUNK // vocab_size)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@dataclass(frozen=True)
class _Task:
    """Rows to draw from, with one value for each row in every [rows, 1] tensor (float64)."""

    scores: Tensor  # [rows, vocab] float32
    best: Tensor  # highest score
    temperature: Tensor
    min_p: Tensor
    number: Tensor  # uniform in [0, 1)
    top_k: Tensor  # vocab size if not asked for
    top_p: Tensor
    mass: Tensor  # sum of all weights; not known, and not needed, where all rows have top_k

    def take(self, rows: Tensor) -> _Task:
        return _Task(**{name: value[rows] for name, value in vars(self).items()})


def _draw(scores: Tensor, best: Tensor, part: list[int], requests: list[Request], filtered: bool) -> Tensor:
    """Return a token for each of the rows `part`, by inverting the cumulative distribution."""
    vocab, params = scores.shape[1], [request.params for request in requests]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores.device)[:, None]

    rows, top = scores[part].float(), best[part].double()[:, None]
    temperature = column([max(p.temperature, _COLDEST) for p in params])
    needs_mass = any(p.top_p < 1 and not 0 < p.top_k < vocab for p in params)
    task = _Task(
        scores=rows,
        best=top,
        temperature=temperature,
        min_p=column([p.min_p for p in params]),
        number=column([uniform(request.seed, len(request.output_ids)) for request in requests]),
        top_k=column([min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params]),
        top_p=column([p.top_p for p in params]),
        mass=_weights(rows, top, temperature).sum(-1, keepdim=True, dtype=torch.float64) if needs_mass else top * 0,
    )
    return _draw_sorted(task) if filtered else _draw_unsorted(task)


def _weights(scores: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Return unnormalised probabilities [rows, vocab] float32; the best token has 1."""
    return (scores - best.float()).div_(temperature.float()).exp_()


def _draw_unsorted(task: _Task) -> Tensor:
    """Draw in the order of ids: first a span of tokens, then a token in it."""
    weights = _weights(task.scores, task.best, task.temperature)
    if task.min_p.any():
        weights *= weights >= task.min_p.float()
    if padding := -weights.shape[1] % _SPAN:
        weights = torch.nn.functional.pad(weights, (0, padding))
    spans = weights.view(len(weights), -1, _SPAN)
    sums = spans.sum(-1, dtype=torch.float64)  # [rows, spans]
    span, rest = _invert(sums, task.number * sums.sum(-1, keepdim=True))
    inner = spans.gather(1, span[:, :, None].expand(-1, -1, _SPAN))[:, 0].double()  # [rows, span]
    place, _ = _invert(inner, rest)
    return (span * _SPAN + place)[:, 0]


def _invert(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index [rows, 1] at which the running sum of weights passes target, and target less the sum before it.

    An index without weight is never returned, also where rounding puts the target past the end.
    """
    sums = weights.cumsum(-1)
    last = (sums < sums[:, -1:]).sum(-1, keepdim=True)
    index = (sums <= target).sum(-1, keepdim=True).minimum(last)
    before = torch.where(index > 0, sums.gather(1, (index - 1).clamp_min(0)), 0.0)
    return index, target - before


def _draw_sorted(task: _Task) -> Tensor:
    """Draw in the order of scores, looking at more and more of the best until the filters end among them."""
    rows, vocab = task.scores.shape
    tokens = torch.zeros(rows, dtype=torch.int64, device=task.scores.device)
    left = torch.arange(rows, device=task.scores.device)  # rows without a token
    for width in (*(width for width in _WIDTHS if width < vocab), vocab):
        drawn, decided = _draw_among(task, width)
        tokens[left[decided]] = drawn[decided]
        left, task = left[~decided], task.take(~decided)
        if not len(left):
            break
    return tokens


def _draw_among(task: _Task, width: int) -> tuple[Tensor, Tensor]:
    """Draw from the `width` best tokens; return tokens [rows], and [rows] bool: True where no more are needed."""
    vocab = task.scores.shape[1]
    values = task.scores.topk(width).values  # [rows, width], falling
    weights = ((values.double() - task.best) / task.temperature).exp()
    sums = weights.cumsum(-1)
    cut = task.top_k.long().clamp_max(width) - 1
    mass = torch.where(task.top_k < vocab, sums.gather(1, cut), task.mass)  # top_p is a share of what top_k leaves
    inside = torch.arange(width, device=values.device) < task.top_k
    kept = inside & (weights >= task.min_p)
    kept[:, 1:] &= sums[:, :-1] < (task.top_p * mass)  # the token that reaches top_p stays
    weights *= kept
    index, _ = _invert(weights, task.number * weights.sum(-1, keepdim=True))
    chosen = values.gather(1, index)
    equals_before = index - (values > chosen).sum(-1, keepdim=True)
    ends = (task.top_k <= width) | ((task.top_k == vocab) & ~kept[:, -1:])
    return _nth_equal(task.scores, chosen, equals_before[:, 0]), ends[:, 0]


def _nth_equal(scores: Tensor, value: Tensor, nth: Tensor) -> Tensor:
    """Return the id [rows] of the nth (from 0) of the tokens whose score is `value` [rows, 1], by rising id."""
    rows, ids = (scores == value).nonzero(as_tuple=True)
    starts = torch.searchsorted(rows, torch.arange(len(scores), device=rows.device))
    return ids[starts + nth]


def _why(logits: Tensor) -> str:
    return NOTHING_LEFT if logits.max().isfinite() else NOT_FINITE


# --------------------------------------------------------------------------------------------- logprobs


def _logprobs(logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Return for each row its token's logprob and rank, then those of its `counts` best tokens, ties by lowest id.

    NaN logits give a NaN logprob for the token, and no best ones.
    """
    found: list[TokenLogprobs] = []
    for part in _parts(list(range(len(token_ids))), logits.shape[1]):
        ids, asked = [token_ids[row] for row in part], [counts[row] for row in part]
        found += _logprobs_of_part(logits[part].float(), ids, asked)
    return found


def _logprobs_of_part(logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    norms = logits.logsumexp(-1, keepdim=True)
    tokens = torch.tensor(token_ids, device=logits.device)[:, None]
    chosen = logits.gather(1, tokens)
    values = (chosen - norms)[:, 0].tolist()
    ranks = ((logits > chosen).sum(-1) + _equals_before(logits, tokens, chosen) + 1).tolist()
    tables: list[TokenLogprobs] = [
        {token: Logprob(value, rank)} for token, value, rank in zip(token_ids, values, ranks, strict=True)
    ]
    if any(counts):
        bests = _best(logits, norms, max(counts))
        for table, best, count in zip(tables, bests, counts, strict=True):
            for rank, (token, value) in enumerate(best[:count], start=1):
                table.setdefault(token, Logprob(value, rank))
    return tables


def _equals_before(logits: Tensor, tokens: Tensor, chosen: Tensor) -> Tensor:
    """Return how many tokens of a lower id have the chosen one's logit, for each row."""
    rows, ids = (logits == chosen).nonzero(as_tuple=True)
    counts = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return counts.index_add_(0, rows, (ids < tokens[rows, 0]).long())


def _best(logits: Tensor, norms: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Return the best (token id, logprob) of each row, best first; one chosen token may be among them."""
    lowest = logits.topk(min(count, logits.shape[1])).values[:, -1:]
    rows, ids = (logits >= lowest).nonzero(as_tuple=True)  # more than count where the last ones are equal
    values = (logits[rows, ids] - norms[rows, 0]).cpu().numpy()
    scores, row_of, id_of = logits[rows, ids].cpu().numpy(), rows.cpu().numpy(), ids.cpu().numpy()
    order = np.lexsort((id_of, -scores, row_of))
    ends = np.searchsorted(row_of, np.arange(len(logits) + 1))
    return [
        [(int(id_of[at]), float(values[at])) for at in order[start : min(end, start + count)]]
        for start, end in pairwise(ends)
    ]
