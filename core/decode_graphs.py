"""Decode steps as graphs: which steps are captured, how their inputs are padded, and when a step runs plainly.

A step is captured when every request runs one token, all of them sample, and nothing else is asked. Graphs are kept by
two sizes: requests, and tokens of the longest context. Both are rounded up, so that few graphs serve all steps:

    requests   1, 2, 4, 8, ... to the most that run at a time
    keys       1024, 2048, 4096, ... to the model's length, which fixes the width of the block tables

Requests that a batch has too few read nothing and write nothing: their context is 0 and their slot -1.

A step that waits for the device cannot be captured, and what Python decides is frozen into a graph. Of a model whose
code nobody knows, each graph's second step is run plainly as well; where the two differ, nothing is captured any more.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from core.batch import Batch, Places
from core.contracts import Model, StagedAttention
from core.device import DeviceModule, Graph, NotCaptured
from core.staging import Layout, tensors_of, with_tensors

logger = logging.getLogger("core_serve")
FEWEST_KEYS = 1024
TOLERATED = {torch.float32: 1e-4}  # difference of a graph's logits from a plain step's, by norm
TOLERATED_IN_HALF = 2e-2
NO_SLOT = -1


@dataclass(frozen=True)
class Size:
    """What one graph is for."""

    requests: int
    keys: int  # tokens of a context, at the most


@dataclass(frozen=True)
class Sizes:
    """Which graphs there may be."""

    most_requests: int
    most_keys: int
    block_size: int

    def of(self, batch: Batch) -> Size | None:
        """Return the graph's size for a batch, None if it runs plainly."""
        count = batch.num_requests
        if batch.num_tokens != count or len(batch.logit_rows) != count or count > self.most_requests:
            return None
        longest = max(batch.context_lens)
        if longest > self.most_keys:
            return None
        return Size(_power(count, 1), _power(longest, FEWEST_KEYS))

    def blocks(self, size: Size) -> int:
        """Return the width of a graph's block tables."""
        return -(-min(size.keys, self.most_keys) // self.block_size)


def _power(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


def padded(batch: Batch, size: Size, blocks: int) -> Batch:
    """Return a batch on the host with as many requests as the graph has; context_lens of those added are 0."""
    more = size.requests - batch.num_requests
    return replace(
        batch,
        token_ids=pad(batch.token_ids, (0, more)),
        positions=pad(batch.positions, (0, more)),
        everything=_padded(batch.everything, more, blocks),
        query_starts=list(range(size.requests + 1)),
        context_lens=batch.context_lens + [0] * more,
        logit_rows=torch.arange(size.requests),
        windows={reach: _padded(places, more, blocks) for reach, places in batch.windows.items()},
    )


def _padded(places: Places, more: int, blocks: int) -> Places:
    tables = pad(places.block_tables, (0, blocks - places.block_tables.shape[1], 0, more))
    return Places(pad(places.slots, (0, more), value=NO_SLOT), tables)


class DecodeGraphs:
    """The graphs of one model on one attention backend; each is captured when its size is first needed."""

    def __init__(self, model: Model, attention: StagedAttention, device: DeviceModule, sizes: Sizes) -> None:
        self.model, self.attention, self.device, self.sizes = model, attention, device, sizes
        self._made: dict[Size, _DecodeGraph] = {}
        self.given_up = ""  # why nothing is captured any more

    def run(self, batch: Batch) -> Tensor | None:
        """Return the logits [requests, vocab] for a batch on the host, valid until the next call; None: run it plainly.

        One copy to the device, no wait.
        """
        size = None if self.given_up else self.sizes.of(batch)
        if size is None:
            return None
        filled = padded(batch, size, self.sizes.blocks(size))
        inputs = tensors_of(filled) + list(self.attention.stage(filled.query_starts, filled.context_lens))
        if size not in self._made:
            self._made[size] = _DecodeGraph(self.model, self.attention, self.device, filled, inputs, size)
        try:
            return self._made[size].run(inputs, batch.num_requests)
        except NotCaptured as reason:
            logger.warning("decode steps of %s are not captured as graphs: %s", self.model.impl_name, reason)
            self.given_up = str(reason)
            self._made.clear()
            return None


class _DecodeGraph:
    """One graph and the buffer that it reads."""

    def __init__(
        self,
        model: Model,
        attention: StagedAttention,
        device: DeviceModule,
        batch: Batch,
        inputs: Sequence[Tensor],
        size: Size,
    ) -> None:
        self.model, self.attention, self.device = model, attention, device
        self.layout = Layout.like(inputs)
        self.buffer = device.buffer(self.layout.size)
        views = iter(self.layout.views(self.buffer))
        # Its lists say what a step may be at the most: nothing that changes from step to step may be read from them.
        lists = replace(batch, scheduled=(), context_lens=[size.keys] * size.requests)
        self.batch, self.staged = with_tensors(lists, views), list(views)
        self.graph: Graph | None = None
        self.on_trial = False

    def run(self, inputs: Sequence[Tensor], count: int) -> Tensor:
        """Return the logits [count, vocab]. Raises NotCaptured."""
        self.device.copy(self.layout.pack(inputs, self.device), self.buffer)
        if self.graph is None:
            self.graph = self.device.capture(self._forward)
            self.on_trial = self.model.features.captures_on_trial
            return self.graph.replay()[:count]
        logits = self.graph.replay()[:count]
        if self.on_trial:
            self.on_trial = False
            self._compare(logits, count)
        return logits

    def _compare(self, logits: Tensor, count: int) -> None:
        """Run the step plainly as well: it writes the same K and V to the same slots."""
        plain = self._forward()[:count].float()
        difference = (logits.float() - plain).norm() / plain.norm().clamp(min=1e-30)
        found = float(self.device.read(difference))
        if not found <= TOLERATED.get(logits.dtype, TOLERATED_IN_HALF):
            raise NotCaptured(f"a graph's logits differ from a plain step's by {found:.3g} of their norm")

    def _forward(self) -> Tensor:
        self.attention.plan_staged(self.batch, self.staged)
        return self.model.forward(self.batch)
