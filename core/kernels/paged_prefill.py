"""Attention of a flat batch of requests of any lengths over their paged contexts: prefill, with or without a prefix.

    out[token, head] = softmax over the visible keys of the token's request (attention_tile.py)

q, out [tokens, heads, dim]; keys, values [blocks, block_size, kv_heads, dim] by strides; tables [requests, blocks];
query_starts [requests + 1], context_lens [requests], tiles [n, 2] = (request, first token within its new tokens)
Dao 2023, "FlashAttention-2"; sinks: Xiao et al. 2023, as a logit without a value that joins the softmax at the start.

A program computes the heads of one K/V head for a run of tokens: row m is token m // heads, head m % heads, so that
grouped heads share every K and V that is read.

    rows        t0h0 t0h1 t0h2 | t1h0 t1h1 t1h2 | ...          heads = 3, a tile of 64 rows holds 21 tokens
    keys        [first visible of t0, rounded down to BLOCK_N ... position of the last token]

Keys are cut at multiples of BLOCK_N of their own positions, so a token's result does not depend on the tile it is in.
Registers and shared memory of each tile choice: docs/gpu-kernels.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.contracts import AttentionArgs
from core.kernels.attention_call import PagedCall, attention_constants, check_paged, prefill_tile
from core.kernels.attention_tile import attend_keys, first_visible, load_part, store_part
from core.kernels.checks import check
from core.kernels.chip import Chip, Launch, chip_of

NAME = "paged_prefill"


@triton.jit(do_not_specialize=["tables_row", "distances", "window", "chunk", "group", "heads", "head_tiles"])
def paged_prefill_kernel(
    q: tl.tensor,
    out: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tables: tl.tensor,
    query_starts: tl.tensor,
    context_lens: tl.tensor,
    tiles: tl.tensor,
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
    scale: tl.tensor,
    cap: tl.tensor,
    distances: tl.tensor,
    window: tl.tensor,
    chunk: tl.tensor,
    group: tl.tensor,
    heads: tl.tensor,
    head_tiles: tl.tensor,
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
    request = tl.load(tiles + tl.program_id(0) * 2)
    first_token = tl.load(tiles + tl.program_id(0) * 2 + 1)
    kv_head = tl.program_id(1) // head_tiles
    first_head = tl.program_id(1) % head_tiles * heads
    query_start = tl.load(query_starts + request)
    queries = tl.load(query_starts + request + 1) - query_start
    context = tl.load(context_lens + request)

    rows = tl.arange(0, BLOCK_M)
    token = first_token + rows // heads
    head = first_head + rows % heads
    valid = (token < queries) & (rows < BLOCK_M // heads * heads) & (head < group)
    head += kv_head * group
    position = context - queries + token
    row_first = first_visible(position, window, chunk, WINDOW, CHUNK)
    row_last = tl.where(valid, position, -1)
    needed = first_visible(context - queries + first_token, window, chunk, WINDOW, CHUNK)
    end = tl.minimum(context - queries + first_token + BLOCK_M // heads, context)

    q_rows = (query_start + token).to(tl.int64) * q_token + head * q_head
    query = load_part(q, q_rows, valid, K_DIM, 0, K_MAIN)
    query_rest = query
    if K_REST > 0:
        query_rest = load_part(q, q_rows, valid, K_DIM, K_MAIN, K_REST)
    acc = tl.zeros([BLOCK_M, V_MAIN], tl.float32)
    acc_rest = tl.zeros([BLOCK_M, V_REST if V_REST > 0 else 1], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        peak = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
        total += 1.0

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
        row_first,
        row_last,
        bias,
        head,
        distances,
        needed // BLOCK_N * BLOCK_N,
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
    share = 1.0 / tl.where(total > 0, total, 1.0)
    out_rows = (query_start + token).to(tl.int64) * out_token + head * out_head
    store_part(out, out_rows, valid, acc * share[:, None], V_DIM, 0, V_MAIN, WIDEN)
    if V_REST > 0:
        store_part(out, out_rows, valid, acc_rest * share[:, None], V_DIM, V_MAIN, V_REST, WIDEN)


def tokens_of_a_tile(group: int, call_tile_rows: int) -> int:
    """How many tokens one program takes: its rows are shared out among the heads of a K/V head."""
    return call_tile_rows // min(group, call_tile_rows)


def make_tiles(query_lens: Sequence[int], requests: Sequence[int], tokens: int) -> list[tuple[int, int]]:
    """Return (request, first token) for the tiles of `tokens` tokens that cover `requests`, the longest first."""
    tiles = [(row, first) for row in requests for first in range(0, query_lens[row], tokens)]
    return sorted(tiles, key=lambda tile: -tile[1])


def paged_prefill(
    q: Tensor,
    out: Tensor,
    call: PagedCall,
    tiles: Tensor,
    args: AttentionArgs,
    chip: Chip | None = None,
) -> None:
    """Attend for the tokens that `tiles` [n, 2] int32 cover; fills their rows of `out`, touches no others.

    q [tokens, heads, k_dim], out [tokens, heads, v_dim]. `tiles` must be made for `prefill_tile(...)` of this call.
    Raises KernelError.
    """
    chip = chip or chip_of(q)
    check_paged(NAME, q, out, call, args)
    check(NAME, "tiles", tiles, (None, 2), (torch.int32,), q, dense=True)
    tile = prefill_tile(call, q, args, chip.target)
    group = q.shape[1] // call.kv_heads
    heads = min(group, tile.rows)
    grid = (tiles.shape[0], call.kv_heads * -(-group // heads))
    constants = attention_constants(q, out, call, args, tile, chip)
    chip.run(
        Launch(
            paged_prefill_kernel,
            grid,
            constants | {"tiles": tiles, "heads": heads, "head_tiles": -(-group // heads)},
            tile.num_warps,
            tile.num_stages,
            uses_tensor_cores=q.element_size() == 2,
            all_registers=q.element_size() == 4,
        )
    )
