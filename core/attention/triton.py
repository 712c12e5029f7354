"""Attention on CUDA and ROCm by our own Triton kernels; on a CPU in Triton's interpreter, to test them without a GPU.

A step's requests with one new token go through paged decode, the others through paged prefill. What Python knows of the
batch is copied to the device with the step's other inputs, prefill's tiles once more, and nothing is read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from core.attention.interface import PagedCache, check_call
from core.batch import Batch
from core.contracts import AttentionArgs, KVSpec
from core.kernels.attention_call import PagedCall, prefill_tile, splits_for
from core.kernels.chip import chip_of
from core.kernels.paged_decode import SPLIT, paged_decode
from core.kernels.paged_prefill import make_tiles, paged_prefill, tokens_of_a_tile
from core.kernels.write_kv import write_kv


@dataclass
class Plan:
    """What all layers of a step share; tensors are on the batch's device."""

    batch: Batch
    prefill_rows: list[int]  # requests with more than one new token
    query_starts: Tensor  # [requests + 1] int32
    context_lens: Tensor  # [requests] int32
    decode_rows: Tensor  # [decoding requests] int32
    splits: int  # of the longest decoding context
    tiles: dict[int, Tensor] = field(default_factory=dict)  # tokens of a tile -> [tiles, 2] int32


class TritonAttention:
    """Honours every argument but attention to the future."""

    name = "triton"
    honours = frozenset({"window", "chunk", "softcap", "sinks", "bias", "bias_table"})

    def allocate(self, specs: Sequence[KVSpec], num_blocks: Sequence[int], block_size: int) -> None:
        self.cache = PagedCache(specs, num_blocks, block_size)

    def plan(self, batch: Batch) -> None:
        staged = self.stage(batch.query_starts, batch.context_lens)
        self.plan_staged(batch, [tensor.to(batch.token_ids.device) for tensor in staged])

    def stage(self, query_starts: Sequence[int], context_lens: Sequence[int]) -> Sequence[Tensor]:
        """Return query starts, context lengths and the rows that decode, int32."""
        decode = [row for row, (start, end) in enumerate(pairwise(query_starts)) if end - start == 1]
        return [torch.tensor(numbers, dtype=torch.int32) for numbers in (query_starts, context_lens, decode)]

    def plan_staged(self, batch: Batch, staged: Sequence[Tensor]) -> None:
        starts, contexts, rows = staged
        lens = batch.query_lens
        prefill = [row for row, count in enumerate(lens) if count > 1]
        longest = max((batch.context_lens[row] for row, count in enumerate(lens) if count == 1), default=1)
        self._plan = Plan(batch, prefill, starts, contexts, rows, splits_for(longest, SPLIT))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, args: AttentionArgs) -> Tensor:
        spec, plan = self.cache.specs[layer], self._plan
        check_call(self.name, self.honours, spec, q, k, v, args)
        keys, values, places = self.cache.keys[layer], self.cache.values[layer], plan.batch.places(spec.reach)
        write_kv(_rows_dense(k), _rows_dense(v), keys, values, places.slots)
        dtype = torch.promote_types(q.dtype, keys.dtype)
        queries = _rows_dense(q).to(dtype)
        out = queries.new_empty(q.shape[0], q.shape[1], v.shape[-1])
        call = PagedCall(keys, values, places.block_tables, plan.query_starts, plan.context_lens)
        args = _dense_args(args)
        if len(plan.decode_rows):
            paged_decode(queries, out, call, plan.decode_rows, plan.splits, args)
        if plan.prefill_rows:
            paged_prefill(queries, out, call, self._tiles(call, queries, args), args)
        return out.to(q.dtype)

    def _tiles(self, call: PagedCall, q: Tensor, args: AttentionArgs) -> Tensor:
        """Make the tiles once for all layers whose heads are grouped alike."""
        rows = prefill_tile(call, q, args, chip_of(q).target).rows
        tokens = tokens_of_a_tile(q.shape[1] // call.kv_heads, rows)
        if tokens not in self._plan.tiles:
            made = make_tiles(self._plan.batch.query_lens, self._plan.prefill_rows, tokens)
            flat = [number for tile in made for number in tile]
            self._plan.tiles[tokens] = upload(flat, q.device).view(-1, 2)
        return self._plan.tiles[tokens]


def upload(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Copy numbers to a device as int32, without waiting for it."""
    made = torch.tensor(numbers, dtype=torch.int32)
    return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)


def _rows_dense(x: Tensor) -> Tensor:
    """The kernels take any strides but the last, which must be 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _dense_args(args: AttentionArgs) -> AttentionArgs:
    if args.sinks is None and args.bias is None:
        return args
    return AttentionArgs(
        scaling=args.scaling,
        causal=args.causal,
        window=args.window,
        chunk=args.chunk,
        softcap=args.softcap,
        sinks=None if args.sinks is None else args.sinks.reshape(-1).contiguous(),
        bias=None if args.bias is None else args.bias.contiguous(),
    )
