"""Runner: scheduled tokens -> Batch -> model -> logits. Knows tensors and the model, not the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.batch import Batch, Places
from core.contracts import AttentionBackend, Model
from core.reach import Reach
from core.request import ScheduledTokens


@dataclass(frozen=True)
class StepLogits:
    """The logits of one step, by entry."""

    sampled_rows: Tensor  # [rows, vocab]: entry.num_sampled rows for each entry, in their order
    prompt_rows: dict[int, Tensor]  # entry index -> [tokens of its prompt, vocab], where prompt logprobs were asked


class Runner:
    """Runs one model on one attention backend."""

    def __init__(
        self,
        model: Model,
        attention: AttentionBackend | None,
        block_size: int,
        device: torch.device,
        reaches: Sequence[Reach] = (),
    ) -> None:
        """`reaches`: what each of a request's window_tables is for."""
        self.model, self.attention, self.block_size, self.device = model, attention, block_size, device
        self.reaches = tuple(reaches)
        self.has_kv = bool(model.kv_specs())

    @torch.inference_mode()
    def run(self, entries: Sequence[ScheduledTokens], wants_prompt: set[int]) -> StepLogits:
        """Run `entries`; `wants_prompt` holds the indices of those whose prompt rows are wanted."""
        batch, ranges, last = self._batch(entries, wants_prompt)
        if self.attention is not None and self.has_kv:
            self.attention.plan(batch)
        logits = self.model.forward(batch)
        prompt_rows = {index: logits[start:end] for index, (start, end) in ranges.items()}
        sampled = logits if len(last) == len(logits) else logits[torch.tensor(last, dtype=torch.int64)]
        return StepLogits(sampled, prompt_rows)

    def _batch(
        self, entries: Sequence[ScheduledTokens], wants_prompt: set[int]
    ) -> tuple[Batch, dict[int, tuple[int, int]], list[int]]:
        ids: list[int] = []
        starts = [0]
        for entry in entries:
            ids.extend(entry.token_ids())
            starts.append(len(ids))
        rows, ranges, last = _logit_rows(entries, starts, wants_prompt)
        positions = self._positions(entries)
        counts = torch.tensor([entry.count for entry in entries])
        windows = {
            reach: self._places([entry.request.window_tables[index].ids for entry in entries], positions, counts)
            for index, reach in enumerate(self.reaches)
        }
        batch = Batch(
            scheduled=entries,
            token_ids=torch.tensor(ids, dtype=torch.int64).to(self.device),
            positions=positions.to(self.device),
            everything=self._places([entry.request.block_ids for entry in entries], positions, counts),
            query_starts=starts,
            context_lens=[entry.end for entry in entries],
            logit_rows=torch.tensor(rows, dtype=torch.int64).to(self.device),
            attention=self.attention,
            windows=windows,
        )
        return batch, ranges, last

    def _positions(self, entries: Sequence[ScheduledTokens]) -> Tensor:
        if all(entry.count == 1 for entry in entries):
            return torch.tensor([entry.start for entry in entries], dtype=torch.int64)
        return torch.cat([torch.arange(entry.start, entry.end) for entry in entries])

    def _places(self, tables: Sequence[list[int]], positions: Tensor, counts: Tensor) -> Places:
        width = max(map(len, tables))
        padded = torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int64)
        padded = padded.view(len(tables), width)
        rows = torch.arange(len(tables)).repeat_interleave(counts)
        slots = padded[rows, positions // self.block_size] * self.block_size + positions % self.block_size
        begun = slots[positions % self.block_size == 0] // self.block_size
        fresh = begun.to(self.device) if len(begun) else None
        return Places(slots.to(self.device), padded.to(self.device), fresh)


def _logit_rows(
    entries: Sequence[ScheduledTokens], starts: list[int], wants_prompt: set[int]
) -> tuple[list[int], dict[int, tuple[int, int]], list[int]]:
    """Return the tokens whose logits are needed, where each entry's prompt rows lie, and where the sampled ones lie."""
    rows: list[int] = []
    ranges: dict[int, tuple[int, int]] = {}
    last: list[int] = []
    for index, entry in enumerate(entries):
        if index in wants_prompt:
            ranges[index] = (len(rows), len(rows) + entry.count)
            rows.extend(range(starts[index], starts[index + 1]))
            last.extend(range(len(rows) - entry.num_sampled, len(rows)))
        elif entry.samples:
            last.extend(range(len(rows), len(rows) + entry.num_sampled))
            rows.extend(range(starts[index + 1] - entry.num_sampled, starts[index + 1]))
    return rows, ranges, last
