"""Attention on a CPU: all decoding requests in one call a layer, prefill chunks one after the other.

decode    K/V blocks of all requests are copied into [requests, longest, kv_heads, dim], the query heads of one K/V
          head stand in the place of query tokens, so that grouped heads need no copies of K and V
prefill   a request's blocks are copied into a row; a first chunk needs no copy
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from core.attention.interface import PagedCache, check_call, softmax_attention, visible
from core.batch import Batch
from core.contracts import AttentionArgs, KVSpec
from core.reach import Reach

Shape = tuple[Reach, int | None, int | None]  # what is kept, window, chunk: what decides which blocks a layer reads


@dataclass(frozen=True)
class DecodeRead:
    """Which blocks the decoding requests read in layers of one shape, and what they see of them."""

    block_ids: Tensor  # [requests * blocks] int64
    mask: Tensor  # [requests, 1, 1, keys] bool
    distance: Tensor  # [requests, 1, 1, keys] int64, query position - key position


@dataclass(frozen=True)
class PrefillRead:
    """Which blocks one prefill chunk reads in layers of one shape, and what it sees of them."""

    block_ids: Tensor | None  # [blocks] int64; None: the chunk is the whole context
    num_keys: int
    mask: Tensor | None  # [queries, keys] bool; None: plain causal over the chunk itself
    q_positions: Tensor  # [queries, 1]
    k_positions: Tensor  # [1, keys]


@dataclass
class Plan:
    """What all layers of a step share."""

    batch: Batch
    decode_rows: list[int]  # requests with one new token
    decode_tokens: Tensor | slice  # where those tokens lie in the flat row
    prefill_rows: list[int]
    last: Tensor  # [decoding requests] int64, position of the new token
    decode_reads: dict[Shape, DecodeRead] = field(default_factory=dict)
    prefill_reads: dict[tuple[int, Shape], PrefillRead] = field(default_factory=dict)


class CpuAttention:
    """Torch's fused attention where it computes what is asked, the plain formula where it cannot (softcap, sinks)."""

    name = "cpu"
    honours = frozenset({"window", "chunk", "softcap", "sinks", "bias", "bias_table"})

    def allocate(self, specs: Sequence[KVSpec], num_blocks: Sequence[int], block_size: int) -> None:
        self.cache = PagedCache(specs, num_blocks, block_size)

    def plan(self, batch: Batch) -> None:
        rows = range(batch.num_requests)
        lens = batch.query_lens
        decode = [row for row in rows if lens[row] == 1]
        tokens = [batch.query_starts[row] for row in decode]
        dense = tokens == list(range(len(tokens)))
        last = torch.tensor([batch.context_lens[row] - 1 for row in decode], dtype=torch.int64)
        self._plan = Plan(
            batch=batch,
            decode_rows=decode,
            decode_tokens=slice(0, len(tokens)) if dense else torch.tensor(tokens, dtype=torch.int64),
            prefill_rows=[row for row in rows if lens[row] > 1],
            last=last,
        )

    def _padded_tables(self, reach: Reach) -> Tensor:
        """Pad with own blocks, not with block 0: what another request left there (NaN, say) must not be read."""
        tables = self._plan.batch.places(reach).block_tables[self._plan.decode_rows]
        newest = self._plan.last[:, None] // self.cache.block_size
        used = newest >= torch.arange(tables.shape[1])
        return torch.where(used, tables, tables.gather(1, newest))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, args: AttentionArgs) -> Tensor:
        spec, plan = self.cache.specs[layer], self._plan
        check_call(self.name, self.honours, spec, q, k, v, args)
        self.cache.write(layer, plan.batch.places(spec.reach), k, v)
        if not plan.prefill_rows:
            return self._decode(q, layer, args)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
        if plan.decode_rows:
            out[plan.decode_tokens] = self._decode(q[plan.decode_tokens], layer, args)
        for row in plan.prefill_rows:
            chunk = slice(plan.batch.query_starts[row], plan.batch.query_starts[row + 1])
            out[chunk] = self._prefill(q[chunk], k[chunk], v[chunk], row, layer, args)
        return out

    # ------------------------------------------------------------------------------------------ decode

    def _decode(self, q: Tensor, layer: int, args: AttentionArgs) -> Tensor:
        """q [requests, heads, k_dim] -> [requests, heads, v_dim]."""
        shape = (self.cache.specs[layer].reach, args.window, args.chunk)
        read = self._plan.decode_reads.get(shape)
        if read is None:
            read = self._plan.decode_reads[shape] = self._decode_read(shape)
        k, v = (x.to(q.dtype) for x in self.cache.gather(layer, read.block_ids))
        k, v = (x.view(len(q), -1, *x.shape[1:]).transpose(1, 2) for x in (k, v))  # [requests, kv_heads, keys, dim]
        grouped = q.view(len(q), k.shape[1], -1, q.shape[-1])
        if _fused(args, k, v):
            out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=read.mask, scale=args.scaling)
        else:
            mask, distance = read.mask.unsqueeze(3), read.distance.unsqueeze(3)
            out = softmax_attention(grouped.unsqueeze(3), k, v, mask, distance, args)
        return out.reshape(len(q), q.shape[1], v.shape[-1])

    def _decode_read(self, shape: Shape) -> DecodeRead:
        """Leave out the blocks that lie before every request's window or chunk."""
        plan, size = self._plan, self.cache.block_size
        reach, window, chunk = shape
        oldest = torch.zeros_like(plan.last)
        if window is not None:
            oldest = (plan.last - window + 1).clamp(min=0)
        if chunk is not None:
            oldest = torch.maximum(oldest, plan.last // chunk * chunk)
        first_block = oldest // size
        count = int((plan.last // size - first_block).max()) + 1
        columns = first_block[:, None] + torch.arange(count)
        tables = self._padded_tables(reach)
        block_ids = tables.gather(1, columns.clamp(max=tables.shape[1] - 1))
        k_positions = (columns[:, :, None] * size + torch.arange(size)).view(len(plan.last), 1, 1, -1)
        q_positions = plan.last.view(-1, 1, 1, 1)
        seen = visible(q_positions, k_positions, AttentionArgs(1.0, window=window, chunk=chunk))
        return DecodeRead(block_ids.view(-1), seen, q_positions - k_positions)

    # ------------------------------------------------------------------------------------------ prefill

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, row: int, layer: int, args: AttentionArgs) -> Tensor:
        """q [queries, heads, k_dim] of one request -> [queries, heads, v_dim]."""
        reach = self.cache.specs[layer].reach
        key = (row, (reach, args.window, args.chunk))
        read = self._plan.prefill_reads.get(key)
        if read is None:
            read = self._plan.prefill_reads[key] = self._prefill_read(row, reach, args)
        if read.block_ids is not None:
            k, v = (x[: read.num_keys] for x in self.cache.gather(layer, read.block_ids))
        else:  # as a later chunk would find them
            k, v = (x.to(self.cache.specs[layer].dtype) for x in (k, v))
        k, v = k.to(q.dtype), v.to(q.dtype)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, tokens, dim]
        if _fused(args, k, v):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=read.mask, is_causal=read.mask is None, scale=args.scaling, enable_gqa=True
            )
        else:
            mask = visible(read.q_positions, read.k_positions, args)
            grouped = q.unflatten(1, (k.shape[1], -1))
            distance = read.q_positions - read.k_positions
            out = softmax_attention(grouped, k, v, mask, distance, args).flatten(1, 2)
        return out[0].transpose(0, 1)

    def _prefill_read(self, row: int, reach: Reach, args: AttentionArgs) -> PrefillRead:
        batch, size = self._plan.batch, self.cache.block_size
        context, queries = batch.context_lens[row], batch.query_lens[row]
        q_positions = torch.arange(context - queries, context)[:, None]
        oldest = Reach(args.window, args.chunk).oldest(context - queries)
        first_block = 0 if context == queries else oldest // size
        k_positions = torch.arange(first_block * size, context)[None, :]
        narrow = args.window is not None or args.chunk is not None
        mask = visible(q_positions, k_positions, args) if narrow or context > queries else None
        block_ids = None if context == queries else self._table(row, reach)[first_block : -(-context // size)]
        return PrefillRead(block_ids, context - first_block * size, mask, q_positions, k_positions)

    def _table(self, row: int, reach: Reach) -> Tensor:
        return self._plan.batch.places(reach).block_tables[row]


def _fused(args: AttentionArgs, k: Tensor, v: Tensor) -> bool:
    """True if torch's fused attention computes exactly what is asked."""
    return args.softcap is None and args.sinks is None and args.bias is None and k.shape[-1] == v.shape[-1]
