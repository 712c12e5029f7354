"""Compares what the served model gives, step by step, with what plain transformers gave. Knows tensors, no engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.verify_measure import distance, divergence, errors, spread
from core.verify_plain import PlainAnswer, PlainText
from core.verify_report import GreedyResult, LayerError, LogitErrors

NOISE = 32.0  # a right implementation rounds in every operation, not only once
NOISE_LIMIT = 0.5  # standard deviations; noise is no excuse for more


@dataclass
class _Worst:
    """The error so far that goes furthest beyond what is allowed where it is."""

    error: float = 0.0
    allowed: float = math.inf
    length: int = 0
    position: int = 0

    def see(self, found: Tensor, allowed: Tensor, positions: Tensor, length: int) -> None:
        """found, allowed, positions [rows]; NaN counts as infinitely far."""
        if not len(found):
            return
        found = torch.nan_to_num(found, nan=math.inf)
        row = int((found / allowed).argmax())
        error, limit = float(found[row]), float(allowed[row])
        if math.isinf(self.allowed) or error / limit > self.error / self.allowed:
            self.error, self.allowed, self.length, self.position = error, limit, length, int(positions[row])


class Comparison:
    """Collects errors over all texts; `take` fits `core.verify_served.Take`."""

    def __init__(self, texts: Sequence[PlainText], layer_names: Sequence[str], tolerance: float) -> None:
        self.texts = texts
        self.tolerance = tolerance
        self.layer_names = layer_names
        self._layers = [_Worst() for _ in layer_names]
        self._logits = _Worst()
        self._seen: set[int] = set()  # texts of which some logits were compared
        self._positions, self._agree, self._kl_sum, self._kl_max, self._difference = 0, 0, 0.0, 0.0, 0.0

    def take(self, number: int, start: int, logits: Tensor, hidden: list[Tensor] | None) -> None:
        """logits [rows, vocab] of the positions from `start` on; hidden [rows, hidden] by layer, if known."""
        text = self.texts[number]
        kept = _between(text.logits_at, start, len(logits))
        self._take_logits(text, kept, logits[(text.logits_at[kept] - start).to(logits.device)].float().cpu())
        self._seen.add(number)
        if hidden is not None:
            self.take_hidden(number, start, hidden)

    def take_hidden(self, number: int, start: int, hidden: Sequence[Tensor]) -> None:
        text = self.texts[number]
        kept = _between(text.hidden_at, start, len(hidden[0]))
        at = text.hidden_at[kept]
        for layer, worst in enumerate(self._layers):
            found = errors(text.hidden[layer][kept], hidden[layer][at - start])
            worst.see(found, self._allowed(text.hidden_noise[layer][kept]), at, len(text.ids))

    def _take_logits(self, text: PlainText, kept: Tensor, served: Tensor) -> None:
        plain = text.logits[kept]
        if not len(plain):
            return
        allowed = self._allowed(text.logits_noise[kept])
        self._logits.see(errors(plain, served), allowed, text.logits_at[kept], len(text.ids))
        kl = divergence(plain, served)
        self._positions += len(plain)
        self._agree += int((plain.argmax(-1) == served.argmax(-1)).sum())
        self._kl_sum += float(kl.sum())
        self._kl_max = max(self._kl_max, float(kl.max()))
        self._difference = max(self._difference, _largest(distance(plain, served)))

    def _allowed(self, noise: Tensor) -> Tensor:
        """noise [rows], how far plain moves when its embeddings do by the last bit. A right model rounds more often."""
        return (NOISE * noise).clamp(max=NOISE_LIMIT).clamp(min=self.tolerance)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(text.ids) for number, text in enumerate(self.texts) if number in self._seen)

    def layers(self, served_names: Sequence[str]) -> tuple[LayerError, ...]:
        return tuple(
            LayerError(name, served, worst.error, worst.allowed, worst.length, worst.position)
            for name, served, worst in zip(self.layer_names, served_names, self._layers, strict=True)
        )

    def logits(self) -> LogitErrors:
        worst, count = self._logits, max(self._positions, 1)
        error = worst.error if self._positions else math.inf
        allowed = worst.allowed if self._positions else self.tolerance
        means = self._kl_sum / count, self._kl_max, self._agree / count, self._difference
        return LogitErrors(self._positions, *means, error, allowed, worst.length, worst.position)


def compare_answer(plain: PlainAnswer, found: Sequence[int]) -> GreedyResult:
    """Find where two greedy answers part, and how sure plain is of its own token there."""
    count = len(plain.token_ids)
    for at, token in enumerate(plain.token_ids):
        if at >= len(found):
            return GreedyResult(len(plain.prompt), count, at, math.inf)
        if found[at] != token:
            row = plain.logits[at]
            margin = float((row[token] - row[found[at]]) / spread(row[None])[0])
            return GreedyResult(len(plain.prompt), count, at, margin)
    return GreedyResult(len(plain.prompt), count, count, None)


def _between(positions: Tensor, start: int, count: int) -> Tensor:
    """Return which rows of `positions` lie in [start, start + count)."""
    return ((positions >= start) & (positions < start + count)).nonzero()[:, 0]


def _largest(values: Tensor) -> float:
    return float(torch.nan_to_num(values, nan=math.inf).max())
