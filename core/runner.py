"""Runner: scheduled tokens -> Batch -> model -> logits. Knows tensors and the model, not the policy.

A batch is made on the host. A CPU runs it as it is; for another device its tensors are copied in one piece, or, where
decode steps are captured, into the buffer of the graph of its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.batch import Batch, Places
from core.contracts import AttentionBackend, Model, StagedAttention
from core.decode_graphs import DecodeGraphs, Sizes
from core.device import DeviceModule, device_module
from core.reach import Reach
from core.request import ScheduledTokens
from core.staging import tensors_of, to_device, with_tensors


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
        device: torch.device | DeviceModule,
        reaches: Sequence[Reach] = (),
        graph_sizes: Sizes | None = None,
        screens: bool = True,
    ) -> None:
        """`reaches`: what each of a request's window_tables is for; `graph_sizes`: None = nothing is captured.

        `screens`: a batch says where only the highest logits are wanted.
        """
        self.model, self.attention, self.block_size = model, attention, block_size
        self.device = device_module(device) if isinstance(device, torch.device) else device
        self.reaches, self.screens = tuple(reaches), screens
        self.has_kv = bool(model.kv_specs())
        self.graphs = self._graphs(graph_sizes)

    def _graphs(self, sizes: Sizes | None) -> DecodeGraphs | None:
        """Return None where a step cannot be captured: on a CPU, or if model or backend read more than tensors."""
        captures = self.device.stages and self.has_kv and self.model.features.captures_decode
        if sizes is None or not captures or not isinstance(self.attention, StagedAttention):
            return None
        return DecodeGraphs(self.model, self.attention, self.device, sizes)

    @torch.inference_mode()
    def run(self, entries: Sequence[ScheduledTokens], wants_prompt: set[int]) -> StepLogits:
        """Run `entries`; `wants_prompt` holds the indices of those whose prompt rows are wanted."""
        batch, ranges, last = self._batch(entries, wants_prompt)
        logits = self._staged_logits(batch) if self.device.stages else self._logits(batch)
        prompt_rows = {index: logits[start:end] for index, (start, end) in ranges.items()}
        return StepLogits(logits if len(last) == len(logits) else self._rows_of(logits, last), prompt_rows)

    def _logits(self, batch: Batch) -> Tensor:
        if self.attention is not None and self.has_kv:
            self.attention.plan(batch)
        return self.model.forward(batch)

    def _staged_logits(self, batch: Batch) -> Tensor:
        captured = self.graphs.run(batch) if self.graphs is not None else None
        if captured is not None:
            return captured
        if not isinstance(self.attention, StagedAttention) or not self.has_kv:
            return self._logits(with_tensors(batch, iter(to_device(tensors_of(batch), self.device))))
        staged = self.attention.stage(batch.query_starts, batch.context_lens)
        moved = iter(to_device([*tensors_of(batch), *staged], self.device))
        batch = with_tensors(batch, moved)
        self.attention.plan_staged(batch, list(moved))
        return self.model.forward(batch)

    def _rows_of(self, logits: Tensor, rows: list[int]) -> Tensor:
        index = torch.tensor(rows, dtype=torch.int64)
        return logits[to_device([index], self.device)[0] if self.device.stages else index]

    def _batch(
        self, entries: Sequence[ScheduledTokens], wants_prompt: set[int]
    ) -> tuple[Batch, dict[int, tuple[int, int]], list[int]]:
        ids: list[int] = []
        starts = [0]
        for entry in entries:
            ids.extend(entry.token_ids())
            starts.append(len(ids))
        rows, ranges, last = _logit_rows(entries, starts, wants_prompt)
        positions = [position for entry in entries for position in range(entry.start, entry.end)]
        windows = {
            reach: self._places([entry.request.window_tables[index].ids for entry in entries], entries)
            for index, reach in enumerate(self.reaches)
        }
        batch = Batch(
            scheduled=entries,
            token_ids=torch.tensor(ids, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int64),
            everything=self._places([entry.request.block_ids for entry in entries], entries),
            query_starts=starts,
            context_lens=[entry.end for entry in entries],
            logit_rows=torch.tensor(rows, dtype=torch.int64),
            attention=self.attention,
            windows=windows,
            only_highest=self.screens and all(entry.request.params.only_highest for entry in entries),
        )
        return batch, ranges, last

    def _places(self, tables: Sequence[list[int]], entries: Sequence[ScheduledTokens]) -> Places:
        """In plain Python: one operation on tensors takes as long as all of this does for a decode step."""
        size, width = self.block_size, max(map(len, tables))
        slots: list[int] = []
        fresh: list[int] = []
        for table, entry in zip(tables, entries, strict=True):
            at, end = entry.start, entry.end
            while at < end:
                block, offset = table[at // size], at % size
                count = min(size - offset, end - at)
                slots.extend(range(block * size + offset, block * size + offset + count))
                if not offset:
                    fresh.append(block)
                at += count
        padded = torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int64)
        return Places(
            torch.tensor(slots, dtype=torch.int64),
            padded.view(len(tables), width),
            torch.tensor(fresh, dtype=torch.int64) if fresh else None,
        )


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
