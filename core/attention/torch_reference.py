"""The plain attention backend: request by request, the formula as written. The specification of all others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from core.attention.interface import PagedCache, check_call, softmax_attention, visible
from core.batch import Batch
from core.contracts import AttentionArgs, KVSpec


class TorchReferenceAttention:
    """Honours every argument but attention to the future; slow."""

    name = "torch_reference"
    honours = frozenset({"window", "chunk", "softcap", "sinks", "bias", "bias_table"})

    def allocate(self, specs: Sequence[KVSpec], num_blocks: Sequence[int], block_size: int) -> None:
        self.cache = PagedCache(specs, num_blocks, block_size)

    def plan(self, batch: Batch) -> None:
        self.batch = batch

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, args: AttentionArgs) -> Tensor:
        check_call(self.name, self.honours, self.cache.specs[layer], q, k, v, args)
        self.cache.write(layer, self.batch.places(self.cache.specs[layer].reach), k, v)
        starts = self.batch.query_starts
        parts = [self._attend_one(q[start:end], row, layer, args) for row, (start, end) in enumerate(pairwise(starts))]
        return torch.cat(parts)

    def _attend_one(self, q: Tensor, row: int, layer: int, args: AttentionArgs) -> Tensor:
        length, size = self.batch.context_lens[row], self.cache.block_size
        reach = self.cache.specs[layer].reach
        first = reach.oldest(length - len(q)) // size  # blocks before it may have been given back
        table = self.batch.places(reach).block_tables[row, first : -(-length // size)]
        k, v = (x[: length - first * size].transpose(0, 1) for x in self.cache.gather(layer, table))
        positions = torch.arange(length, device=q.device)
        q_positions, k_positions = positions[-len(q) :, None], positions[None, first * size :]
        grouped = q.view(len(q), k.shape[0], -1, q.shape[-1]).permute(1, 2, 0, 3)
        mask, distance = visible(q_positions, k_positions, args), q_positions - k_positions
        out = softmax_attention(grouped[None], k[None], v[None], mask, distance, args)[0]
        return out.permute(2, 0, 1, 3).reshape(len(q), q.shape[1], -1)
