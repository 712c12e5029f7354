"""Masks, biases and penalties: what requests change in single logits, gathered from all rows and applied at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.device import DeviceModule
from core.request import Request
from core.sampling_params import SamplingParams
from core.staging import to_device

Ids = NDArray[np.int64]
FLOAT32 = torch.finfo(torch.float32)


class TokenCounts:
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


class RowState:
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
        self._counts: TokenCounts | None = None
        repeats = params.repetition_penalty != 1
        if repeats or params.presence_penalty or params.frequency_penalty:
            prompt = [token for token in request.prompt_ids if token < vocab_size] if repeats else []
            self._counts = TokenCounts(prompt)

    def collect(self, row: int, request: Request, edits: Edits) -> None:
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
class Edits:
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
        factor = min(max(params.repetition_penalty, FLOAT32.tiny), FLOAT32.max)
        loss = params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
        self.factors.append(np.full(len(ids), factor, np.float32))
        self.losses.append(loss.astype(np.float32))

    def apply(self, logits: Tensor, module: DeviceModule) -> Tensor:
        """Return the logits with all changes, `logits` itself if there are none; one copy to the device at the most."""
        rows = [np.array(self.allowed_rows, np.int64)] if self.allowed_rows else []
        lists = (rows, self.allowed, self.banned, self.biased, self.biases, self.penalised, self.factors, self.losses)
        if not any(lists):
            return logits
        given = [torch.from_numpy(np.concatenate(parts)) for parts in lists if parts]
        there = iter(to_device(given, module) if module.stages else given)
        scores = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        flat = scores.view(-1)
        if self.allowed:
            allowed_rows, places = next(there), next(there)
            kept = flat[places]
            scores.index_fill_(0, allowed_rows, -torch.inf)
            flat[places] = kept
        if self.banned:
            flat.index_fill_(0, next(there), -torch.inf)
        if self.biased:
            flat[next(there)] += next(there)
        if self.penalised:
            _penalise(flat, next(there), next(there), next(there))
        return scores


def _penalise(flat: Tensor, places: Tensor, factor: Tensor, loss: Tensor) -> None:
    found = flat[places]
    found = torch.where(found > 0, found / factor, found * factor)
    flat[places] = found - loss
