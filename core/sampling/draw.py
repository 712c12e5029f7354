"""The draw: temperature, top_k, top_p, min_p, and one uniform number a row that depends on its request alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.sampling_params import SamplingParams

CHUNK = 2**22  # logits worked on at a time, so that temporary tensors stay small
SPAN = 256  # tokens whose probabilities are added up before the draw looks at single ones
WIDTHS = (64, 1024, 16384)  # sorted candidates tried before the whole vocabulary is sorted
COLDEST = 1e-6  # below this temperature only equal logits keep a weight in float32
FLOAT32 = torch.finfo(torch.float32)
MASK64 = 2**64 - 1


def uniform(seed: int, step: int) -> float:
    """Return the number in [0, 1) that draws token `step` of the stream `seed`.

    splitmix64 (Steele, Lea, Flood 2014) as a counter: no state to keep, so no order in which to ask.
    """
    mixed = mix(mix(seed) + (step + 1) * 0x9E3779B97F4A7C15)
    return float(mixed >> 11) * 2.0**-53


def mix(value: int) -> int:
    value &= MASK64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK64
    return value ^ (value >> 31)


def is_filtered(params: SamplingParams) -> bool:
    """True if tokens must be sorted; min_p alone needs the best one only."""
    return params.top_k > 0 or params.top_p < 1


def parts_of(rows: list[int], vocab_size: int) -> list[list[int]]:
    size = max(1, CHUNK // vocab_size)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@dataclass(frozen=True)
class Task:
    """Rows to draw from, with one value for each row in every [rows, 1] tensor (float64)."""

    scores: Tensor  # [rows, vocab] float32
    best: Tensor  # highest score
    temperature: Tensor
    min_p: Tensor
    number: Tensor  # uniform in [0, 1)
    top_k: Tensor  # vocab size if not asked for
    top_p: Tensor
    mass: Tensor  # sum of all weights; not known, and not needed, where all rows have top_k

    def take(self, rows: Tensor) -> Task:
        return Task(**{name: value[rows] for name, value in vars(self).items()})


def draw(
    scores: Tensor,
    best: Tensor,
    part: list[int],
    params: Sequence[SamplingParams],
    numbers: list[float],
    filtered: bool,
) -> Tensor:
    """Return a token for each of the rows `part`, by inverting the cumulative distribution at `numbers`, in [0, 1)."""
    vocab = scores.shape[1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores.device)[:, None]

    rows, top = scores[part].float(), best[part].double()[:, None]
    temperature = column([max(p.temperature, COLDEST) for p in params])
    needs_mass = any(p.top_p < 1 and not 0 < p.top_k < vocab for p in params)
    task = Task(
        scores=rows,
        best=top,
        temperature=temperature,
        min_p=column([p.min_p for p in params]),
        number=column(numbers),
        top_k=column([min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params]),
        top_p=column([p.top_p for p in params]),
        mass=weights_of(rows, top, temperature).sum(-1, keepdim=True, dtype=torch.float64) if needs_mass else top * 0,
    )
    return draw_sorted(task) if filtered else draw_unsorted(task)


def weights_of(scores: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Return unnormalised probabilities [rows, vocab] float32; the best token has 1."""
    return (scores - best.float()).div_(temperature.float()).exp_()


def draw_unsorted(task: Task) -> Tensor:
    """Draw in the order of ids: first a span of tokens, then a token in it."""
    weights = weights_of(task.scores, task.best, task.temperature)
    if task.min_p.any():
        weights *= weights >= task.min_p.float()
    if padding := -weights.shape[1] % SPAN:
        weights = torch.nn.functional.pad(weights, (0, padding))
    spans = weights.view(len(weights), -1, SPAN)
    sums = spans.sum(-1, dtype=torch.float64)  # [rows, spans]
    span, rest = invert(sums, task.number * sums.sum(-1, keepdim=True))
    inner = spans.gather(1, span[:, :, None].expand(-1, -1, SPAN))[:, 0].double()  # [rows, span]
    place, _ = invert(inner, rest)
    return (span * SPAN + place)[:, 0]


def invert(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index [rows, 1] at which the running sum of weights passes target, and target less the sum before it.

    An index without weight is never returned, also where rounding puts the target past the end.
    """
    sums = weights.cumsum(-1)
    last = (sums < sums[:, -1:]).sum(-1, keepdim=True)
    index = (sums <= target).sum(-1, keepdim=True).minimum(last)
    before = torch.where(index > 0, sums.gather(1, (index - 1).clamp_min(0)), 0.0)
    return index, target - before


def draw_sorted(task: Task) -> Tensor:
    """Draw in the order of scores, looking at more and more of the best until the filters end among them."""
    rows, vocab = task.scores.shape
    tokens = torch.zeros(rows, dtype=torch.int64, device=task.scores.device)
    left = torch.arange(rows, device=task.scores.device)  # rows without a token
    for width in (*(width for width in WIDTHS if width < vocab), vocab):
        drawn, decided = draw_among(task, width)
        tokens[left[decided]] = drawn[decided]
        left, task = left[~decided], task.take(~decided)
        if not len(left):
            break
    return tokens


def draw_among(task: Task, width: int) -> tuple[Tensor, Tensor]:
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
    index, _ = invert(weights, task.number * weights.sum(-1, keepdim=True))
    chosen = values.gather(1, index)
    equals_before = index - (values > chosen).sum(-1, keepdim=True)
    ends = (task.top_k <= width) | ((task.top_k == vocab) & ~kept[:, -1:])
    return nth_equal(task.scores, chosen, equals_before[:, 0]), ends[:, 0]


def nth_equal(scores: Tensor, value: Tensor, nth: Tensor) -> Tensor:
    """Return the id [rows] of the nth (from 0) of the tokens whose score is `value` [rows, 1], by rising id."""
    rows, ids = (scores == value).nonzero(as_tuple=True)
    starts = torch.searchsorted(rows, torch.arange(len(scores), device=rows.device))
    return ids[starts + nth]
