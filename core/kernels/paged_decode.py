"""Attention of one new token a request over its paged context, the context cut into splits that run side by side.

    split s of a request: acc, peak, total over the keys [s * SPLIT, (s + 1) * SPLIT) (attention_tile.py)
    out[request, head]  = merge of its splits (merge_splits.py); one split alone writes `out` itself

q, out [tokens, heads, dim]; rows [n] = the requests that decode; keys, values, tables, query_starts, context_lens as
in paged_prefill.py; partial [n, heads, splits, v_dim] float32, log_total [n, heads, splits] float32 (log2)
Split K: Dao et al. 2023, "Flash-Decoding for long-context inference".

Splits begin at multiples of SPLIT of the request's own positions, so a request's result does not depend on how long
the others of the batch are: splits past its end, or before its window, are empty and merge with weight 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.contracts import AttentionArgs
from core.kernels.attention_call import PagedCall, attention_constants, check_paged, decode_tile
from core.kernels.attention_tile import attend_keys, first_visible, load_part, store_part
from core.kernels.checks import INTS, check, require
from core.kernels.chip import Chip, Launch, chip_of
from core.kernels.merge_splits import merge_splits

NAME = "paged_decode"
SPLIT = 512  # keys


@triton.jit(
    do_not_specialize=[
        "tables_row",
        "distances",
        "window",
        "chunk",
        "group",
        "heads",
        "head_tiles",
        "splits",
        "kv_heads",
    ]
)
def paged_decode_kernel(
    q: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    log_total: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tables: tl.tensor,
    rows: tl.tensor,
    query_starts: tl.tensor,
    context_lens: tl.tensor,
    sinks: tl.tensor,
    bias: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    out_token: tl.tensor,
    out_head: tl.tensor,
    keys_block: tl.tensor,
    keys_slot: tl.tensor,
    keys_head: tl.tensor,
    values_block: tl.tensor,
    values_slot: tl.tensor,
    values_head: tl.tensor,
    tables_row: tl.tensor,
    splits: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    distances: tl.tensor,
    window: tl.tensor,
    chunk: tl.tensor,
    kv_heads: tl.tensor,
    group: tl.tensor,
    heads: tl.tensor,
    head_tiles: tl.tensor,
    SPLIT: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    K_DIM: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    V_DIM: tl.constexpr,
    V_MAIN: tl.constexpr,
    V_REST: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TABLE: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    request = tl.load(rows + row).to(tl.int32)
    kv_head = tl.program_id(1) // head_tiles
    split = tl.program_id(2)
    token = tl.load(query_starts + request)
    context = tl.load(context_lens + request)

    lanes = tl.arange(0, BLOCK_M)
    head = tl.program_id(1) % head_tiles * heads + lanes
    valid = (lanes < heads) & (head < group)
    head += kv_head * group
    needed = first_visible(context - 1, window, chunk, WINDOW, CHUNK)
    start = tl.maximum(split * SPLIT, needed // BLOCK_N * BLOCK_N)
    end = tl.minimum((split + 1) * SPLIT, context)
    position = lanes * 0 + context - 1
    row_last = tl.where(valid, position, -1)

    q_rows = token.to(tl.int64) * q_token + head * q_head
    query = load_part(q, q_rows, valid, K_DIM, 0, K_MAIN)
    query_rest = query
    if K_REST > 0:
        query_rest = load_part(q, q_rows, valid, K_DIM, K_MAIN, K_REST)
    acc = tl.zeros([BLOCK_M, V_MAIN], tl.float32)
    acc_rest = tl.zeros([BLOCK_M, V_REST if V_REST > 0 else 1], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    acc, acc_rest, peak, total = attend_keys(
        query,
        query_rest,
        acc,
        acc_rest,
        peak,
        total,
        keys + kv_head * keys_head,
        values + kv_head * values_head,
        tables + request.to(tl.int64) * tables_row,
        position,
        lanes * 0 + needed,
        row_last,
        bias,
        head,
        distances,
        start,
        end,
        needed,
        keys_block,
        keys_slot,
        values_block,
        values_slot,
        scale,
        cap,
        BLOCK_SIZE,
        BLOCK_N,
        K_DIM,
        K_MAIN,
        K_REST,
        V_DIM,
        V_MAIN,
        V_REST,
        SOFTCAP,
        TABLE,
        WIDEN,
    )
    some = tl.where(total > 0, total, 1.0)
    share = (1.0 / some)[:, None]
    acc *= share
    acc_rest *= share
    log = tl.where(total > 0, peak + tl.log2(some), float("-inf"))
    if MERGED:
        place = (row.to(tl.int64) * kv_heads * group + head) * splits + split
        tl.store(log_total + place, log, mask=valid)
        store_part(partial, place * V_DIM, valid, acc, V_DIM, 0, V_MAIN, WIDEN)
        if V_REST > 0:
            store_part(partial, place * V_DIM, valid, acc_rest, V_DIM, V_MAIN, V_REST, WIDEN)
    else:
        if sinks is not None:  # as merge_splits.py does it, bit by bit
            sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
            higher = tl.maximum(sink, log)
            weight = tl.exp2(log - higher)
            joined = (tl.exp2(sink - higher) + weight)[:, None]
            acc = acc * weight[:, None] / joined
            acc_rest = acc_rest * weight[:, None] / joined
        out_rows = token.to(tl.int64) * out_token + head * out_head
        store_part(out, out_rows, valid, acc, V_DIM, 0, V_MAIN, WIDEN)
        if V_REST > 0:
            store_part(out, out_rows, valid, acc_rest, V_DIM, V_MAIN, V_REST, WIDEN)


def paged_decode(
    q: Tensor,
    out: Tensor,
    call: PagedCall,
    rows: Tensor,
    splits: int,
    args: AttentionArgs,
    chip: Chip | None = None,
    split: int = SPLIT,
) -> None:
    """Attend for the requests `rows` [n] int32, one new token each; fills their rows of `out`, touches no others.

    `splits` * `split` keys must cover the longest of their contexts; `split` must be a multiple of the tile's keys.
    A request with a context of 0 (padding) gets zeros. Raises KernelError.
    """
    chip = chip or chip_of(q)
    check_paged(NAME, q, out, call, args)
    check(NAME, "rows", rows, (None,), INTS, q, dense=True)
    tile = decode_tile(call, q, args, chip.target)
    require(NAME, splits >= 1, f"splits must be at least 1, got {splits}.")
    require(NAME, split % tile.keys == 0, f"split {split} must be a multiple of the {tile.keys} keys of a tile.")
    group, merged = q.shape[1] // call.kv_heads, splits > 1
    heads = min(group, tile.rows)
    head_tiles = -(-group // heads)
    size = (rows.shape[0], q.shape[1], splits)
    partial = q.new_empty((*size, out.shape[-1]), dtype=torch.float32) if merged else None
    log_total = q.new_empty(size, dtype=torch.float32) if merged else None
    own = {
        "partial": partial,
        "log_total": log_total,
        "rows": rows,
        "splits": splits,
        "kv_heads": call.kv_heads,
        "heads": heads,
        "head_tiles": head_tiles,
        "SPLIT": split,
        "MERGED": merged,
    }
    launched = Launch(
        paged_decode_kernel,
        (rows.shape[0], call.kv_heads * head_tiles, splits),
        attention_constants(q, out, call, args, tile, chip) | own,
        tile.num_warps,
        tile.num_stages,
        uses_tensor_cores=q.element_size() == 2,
        all_registers=q.element_size() == 4,
    )
    chip.run(launched)
    if partial is not None and log_total is not None:
        merge_splits(partial, log_total, out, call.query_starts, rows, args.sinks, chip)
