"""The inner loop of attention over paged K/V, shared by prefill and decode: a tile of rows over a range of keys.

For each row (a query token and head) with the visible keys [row_first, row_last]:

    s_j = scaling * q . k_j                       softcap: s_j = cap * tanh(s_j / cap)
    s_j -= slope * (position - j)                 ALiBi; or s_j += table[min(position - j, distances - 1)]
    peak' = max(peak, max_j s_j)                  total' = total * 2^(peak - peak') + sum_j 2^(s_j - peak')
    acc' = acc * 2^(peak - peak') + sum_j 2^(s_j - peak') v_j

with all scores in units of log2(e), so that exp is exp2. Online softmax: Milakov and Gimelshein 2018; tiles and the
order of loops: Dao 2023, "FlashAttention-2". Softcap: Gemma 2 (2024). ALiBi: Press et al. 2021; tables: Raffel et al.
2019 (T5).

Widths need not be powers of two: K and V are cut into a main part and a rest (576 = 512 + 64, 80 = 64 + 16).
Keys that no row of the tile sees are not read, so what lies in unused slots (NaN, say) does no harm.
"""

from __future__ import annotations

import triton
import triton.language as tl

from core.kernels.numbers import dot, rounded, tanh


@triton.jit
def load_part(
    base: tl.tensor, rows: tl.tensor, there: tl.tensor, DIM: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr
) -> tl.tensor:
    """Load [rows, WIDTH] elements from START on; zero where the row is not there or past DIM."""
    dims = START + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] + dims[None, :]
    if START + WIDTH <= DIM:  # no mask along the row, so that loads stay 16 bytes wide
        return tl.load(pointers, mask=there[:, None], other=0.0)
    return tl.load(pointers, mask=there[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def store_part(
    base: tl.tensor,
    rows: tl.tensor,
    there: tl.tensor,
    x: tl.tensor,
    DIM: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Store float32 x [rows, WIDTH] from START on, rounded to the target's dtype."""
    dims = START + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] + dims[None, :]
    tl.store(pointers, rounded(x, base.dtype.element_ty, WIDEN), mask=there[:, None] & (dims < DIM)[None, :])


@triton.jit
def first_visible(
    position: tl.tensor, window: tl.tensor, chunk: tl.tensor, WINDOW: tl.constexpr, CHUNK: tl.constexpr
) -> tl.tensor:
    """The first key that a query at `position` sees."""
    first = position * 0
    if WINDOW:
        first = tl.maximum(first, position - window + 1)
    if CHUNK:
        first = tl.maximum(first, position // chunk * chunk)
    return first


@triton.jit
def attend_keys(
    q: tl.tensor,  # [rows, K_MAIN]
    q_rest: tl.tensor,  # [rows, K_REST], anything if K_REST is 0
    acc: tl.tensor,  # [rows, V_MAIN] float32
    acc_rest: tl.tensor,  # [rows, V_REST] float32, anything if V_REST is 0
    peak: tl.tensor,  # [rows] float32, -inf: nothing seen yet
    total: tl.tensor,  # [rows] float32
    keys: tl.tensor,  # of this K/V head
    values: tl.tensor,
    table: tl.tensor,  # this request's blocks
    position: tl.tensor,  # [rows], of the query
    row_first: tl.tensor,  # [rows]
    row_last: tl.tensor,  # [rows], inclusive
    bias: tl.tensor,  # slopes [heads], a table [heads, distances], or None
    head: tl.tensor,  # [rows], of the query
    distances: tl.tensor,
    start: tl.tensor,  # keys [start, end) in steps of BLOCK_N ...
    end: tl.tensor,
    needed: tl.tensor,  # ... of which those below `needed` are seen by no row
    keys_block: tl.tensor,
    keys_slot: tl.tensor,
    values_block: tl.tensor,
    values_slot: tl.tensor,
    scale: tl.tensor,  # before tanh
    cap: tl.tensor,  # after tanh
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    K_DIM: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    V_DIM: tl.constexpr,
    V_MAIN: tl.constexpr,
    V_REST: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TABLE: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    """Return acc, acc_rest, peak, total after the keys [start, end)."""
    slope = peak
    if bias is not None and not TABLE:
        slope = tl.load(bias + head, mask=row_last >= 0, other=0.0).to(tl.float32) * 1.4426950408889634
    for n in range(start, end, BLOCK_N):
        at = n + tl.arange(0, BLOCK_N)
        there = (at >= needed) & (at < end)
        block = tl.load(table + at // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        offset = at % BLOCK_SIZE
        k_rows = block * keys_block + offset * keys_slot
        k = load_part(keys, k_rows, there, K_DIM, 0, K_MAIN).to(q.dtype)
        scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32), WIDEN)
        if K_REST > 0:
            k_rest = load_part(keys, k_rows, there, K_DIM, K_MAIN, K_REST).to(q.dtype)
            scores = dot(q_rest, tl.trans(k_rest), scores, WIDEN)
        scores *= scale
        if SOFTCAP:
            scores = tanh(scores) * cap
        seen = (at[None, :] >= row_first[:, None]) & (at[None, :] <= row_last[:, None])
        distance = position[:, None] - at[None, :]
        if TABLE:
            place = head[:, None] * distances + tl.minimum(distance, distances - 1)
            scores += tl.load(bias + place, mask=seen, other=0.0).to(tl.float32) * 1.4426950408889634
        elif bias is not None:
            scores -= slope[:, None] * distance.to(tl.float32)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        peak = higher
        v_rows = block * values_block + offset * values_slot
        v = load_part(values, v_rows, there, V_DIM, 0, V_MAIN).to(q.dtype)
        weights = rounded(weights, q.dtype, WIDEN)
        acc = dot(weights, v, acc * shrink[:, None], WIDEN)
        if V_REST > 0:
            v_rest = load_part(values, v_rows, there, V_DIM, V_MAIN, V_REST).to(q.dtype)
            acc_rest = dot(weights, v_rest, acc_rest * shrink[:, None], WIDEN)
    return acc, acc_rest, peak, total
