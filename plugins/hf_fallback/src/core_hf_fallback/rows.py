"""Tier rows: the batch dimension is the request. Prompts run one by one, decoding requests side by side.

What a request carries (K/V, convolution, SSM, linear attention, indexers) is kept as `generate` would keep it. The
states of the decoding requests stand side by side in one batched state, shorter texts padded on the left, as in
`generate` with a padded batch. Whoever joins or leaves is merged into it or cut out of it; all others stay untouched.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.batch import Batch
from core.contracts import KVSpec, ModelFeatures
from core_hf_fallback.cache import Stepper, Text, rows_of, wanted_rows
from core_hf_fallback.state import CannotBatch, EqualLengths, Schema

logger = logging.getLogger("core_serve.transformers")


@dataclass
class Group:
    """Requests whose states stand side by side."""

    ids: list[str]  # request ids, in order of rows
    lengths: list[int]  # tokens of each, without padding
    text: Text

    @property
    def width(self) -> int:
        return max(self.lengths)


class RowsModel:
    """A `core.contracts.Model` that decodes all requests of a step in one forward.

    Where a model cannot take padding (it counts positions from its cache), only texts of one length stand side by side.
    """

    features = ModelFeatures(chunked_prefill=False, prefix_caching=False)

    def __init__(self, stepper: Stepper, vocab_size: int, padding: bool) -> None:
        """Learn the state's shape. Raises CannotBatch with the reason."""
        self.impl_name = "transformers/rows" if padding else "transformers/rows (texts of one length together)"
        self.padding = padding
        self.strict = True  # for the probe; while serving, a state that fits beside no other stands alone
        self.stepper = stepper
        self.vocab_size = vocab_size
        self.takes_mask = "attention_mask" in inspect.signature(stepper.module.forward).parameters
        self.schema = self._learn() if padding else EqualLengths(self._prefilled)
        self.alone: dict[str, tuple[Text, int]] = {}  # requests outside of groups: their text and its tokens
        self.groups: list[Group] = []
        self.gone: set[str] = set()  # in a group still, but released

    def _learn(self) -> Schema:
        with torch.inference_mode():
            return Schema(*(self._prefilled(*run) for run in ((1, Schema.SHORT), (1, Schema.LONG), (2, Schema.SHORT))))

    def _prefilled(self, texts: int, length: int) -> dict[str, Any]:
        """The state after so many equal texts of `length` tokens."""
        ids = 3 + torch.arange(length, device=self.stepper.device) % Schema.LONG
        return vars(self.stepper.first(ids.repeat(texts, 1), all_logits=False)[0])

    def kv_specs(self) -> Sequence[KVSpec]:
        return []

    def release(self, request_id: str) -> None:
        self.alone.pop(request_id, None)
        if any(request_id in group.ids for group in self.groups):
            self.gone.add(request_id)  # cut out before the next forward, together with others that leave in this step
            if self.gone.issuperset(name for group in self.groups for name in group.ids):
                self.groups.clear()
                self.gone.clear()

    # ------------------------------------------------------------------------------------------ forward

    def forward(self, batch: Batch) -> Tensor:
        if self.gone:
            self._keep_only(lambda name: name not in self.gone)
            self.gone.clear()
        wanted = wanted_rows(batch)
        decoding = [row for row, entry in enumerate(batch.scheduled) if entry.start > 0]
        found = self._decode(batch, decoding) if decoding else {}
        for row, entry in enumerate(batch.scheduled):
            if entry.start == 0:
                found[row] = self._prefill(batch, row, wanted[row])
        return torch.cat([found[row] for row in range(batch.num_requests)])

    def _prefill(self, batch: Batch, row: int, wanted: list[int]) -> Tensor:
        ids = batch.token_ids[None, batch.query_starts[row] : batch.query_starts[row + 1]]
        text, logits = self.stepper.first(ids, all_logits=wanted != [ids.shape[1] - 1])
        self.alone[batch.scheduled[row].request.id] = text, ids.shape[1]
        return rows_of(logits[0], ids.shape[1], wanted)

    def _decode(self, batch: Batch, rows: list[int]) -> dict[int, Tensor]:
        """Run one token of each request in `rows`; return logits [1, vocab] by row."""
        by_name = {batch.scheduled[row].request.id: row for row in rows}
        self._gather(list(by_name))
        found = {}
        for group in self.groups:
            members = [by_name[name] for name in group.ids]
            ids = torch.stack([batch.token_ids[batch.query_starts[row]] for row in members])[:, None]
            logits = self._step(group, ids)
            found.update({row: logits[at, -1:] for at, row in enumerate(members)})
        return found

    def _step(self, group: Group, ids: Tensor) -> Tensor:
        """Run one token [rows, 1] of everybody in a group; return logits [rows, 1, vocab]."""
        group.text, logits = self.stepper.next(group.text, ids, self._mask(group))
        group.lengths = [length + 1 for length in group.lengths]
        return logits

    def _mask(self, group: Group) -> Tensor | None:
        """The padding mask [rows, width + 1] of the coming step; None where there is no padding, as `generate` does."""
        if not self.takes_mask or min(group.lengths) == group.width:
            return None
        padding = group.width - torch.tensor(group.lengths)
        return (torch.arange(group.width + 1) >= padding[:, None]).long().to(self.stepper.device)

    # ------------------------------------------------------------------------------------------ who is in a group

    def _gather(self, names: list[str]) -> None:
        """Make the groups hold exactly `names`."""
        wanted = set(names)
        for group in self.groups:
            for name in group.ids:
                if name not in wanted:  # it pauses
                    self.alone[name] = self._cut_out(group, [name]), group.lengths[group.ids.index(name)]
        self._keep_only(wanted.__contains__)
        present = {name for group in self.groups for name in group.ids}
        self._join([name for name in names if name not in present])

    def _join(self, names: list[str]) -> None:
        """Put newcomers beside those of their group: everybody, or those of the same length."""
        by_group: dict[int, list[str]] = {}
        for name in names:
            by_group.setdefault(0 if self.padding else self.alone[name][1], []).append(name)
        for key, members in by_group.items():
            beside = next((group for group in self.groups if self.padding or group.width == key), None)
            try:
                joined = [self._merged(beside, members)]
            except CannotBatch as reason:
                if self.strict:
                    raise
                logger.info("%d texts run by themselves: %s", len(members), reason)
                joined = [Group([name], [length], text) for name in members for text, length in [self.alone[name]]]
            else:
                self.groups = [group for group in self.groups if group is not beside]
            self.groups += joined
            for name in members:
                del self.alone[name]

    def _merged(self, group: Group | None, names: list[str]) -> Group:
        texts = [self.alone[name] for name in names]
        states, widths = [vars(text) for text, _ in texts], [length for _, length in texts]
        if group is None:
            return Group(names, widths, Text(**self.schema.merge(states, widths)))
        merged = self.schema.merge([vars(group.text), *states], [group.width, *widths])
        return Group([*group.ids, *names], [*group.lengths, *widths], Text(**merged))

    def _keep_only(self, stays: Callable[[str], bool]) -> None:
        """Drop everybody else from the groups, and the padding that only they needed."""
        kept = []
        for group in self.groups:
            names = [name for name in group.ids if stays(name)]
            if len(names) == len(group.ids):
                kept.append(group)
            elif names:
                lengths = dict(zip(group.ids, group.lengths, strict=True))
                kept.append(Group(names, [lengths[name] for name in names], self._cut_out(group, names)))
        self.groups = kept

    def _cut_out(self, group: Group, names: list[str]) -> Text:
        rows = [group.ids.index(name) for name in names]
        width = max(group.lengths[row] for row in rows)
        kept = torch.tensor(rows, device=self.stepper.device)
        return Text(**self.schema.select(vars(group.text), kept, group.width, width))
