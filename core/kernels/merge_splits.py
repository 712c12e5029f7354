"""Merge the splits of a decode step into one answer a head.

    out = sum_s w_s partial_s / (sum_s w_s + 2^(sink - peak)),   w_s = 2^(log_total_s - peak),   peak = max of all

partial [n, heads, splits, v_dim] float32, each normalised by itself; log_total [n, heads, splits] = log2 of the sum of
its weights, -inf for an empty split; sinks [heads] or None; out [tokens, heads, v_dim]
Subtracting the peak makes the merge stable: no weight is above 1. An empty split has weight exactly 0.
Dao et al. 2023, "Flash-Decoding for long-context inference".

Registers: STEP * v_dim / threads floats for the partials of a step. Shared memory: what the reductions take.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.kernels.checks import FLOATS, INTS, check, pow2
from core.kernels.chip import Chip, Launch, chip_of
from core.kernels.numbers import rounded

NAME = "merge_splits"
STEP = 8  # splits added up at a time


@triton.jit(do_not_specialize=["splits", "heads"])
def merge_splits_kernel(
    partial: tl.tensor,
    log_total: tl.tensor,
    out: tl.tensor,
    query_starts: tl.tensor,
    rows: tl.tensor,
    sinks: tl.tensor,
    out_token: tl.tensor,
    out_head: tl.tensor,
    splits: tl.tensor,
    heads: tl.tensor,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    STEP: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    token = tl.load(query_starts + tl.load(rows + row)).to(tl.int64)
    dims = tl.arange(0, V_PAD)
    acc = tl.zeros([V_PAD], tl.float32)
    peak = float("-inf")
    total = 0.0
    if sinks is not None:
        peak = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        total = 1.0
    for first in range(0, splits, STEP):
        split = first + tl.arange(0, STEP)
        place = (row * heads + head) * splits + split
        log = tl.load(log_total + place, mask=split < splits, other=float("-inf"))
        there = (log > float("-inf"))[:, None] & (dims < V_DIM)[None, :]
        parts = tl.load(partial + place[:, None] * V_DIM + dims[None, :], mask=there, other=0.0)
        higher = tl.maximum(peak, tl.max(log, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(log - base)
        shrink = tl.exp2(peak - base)
        acc = acc * shrink + tl.sum(parts * weights[:, None], 0)
        total = total * shrink + tl.sum(weights, 0)
        peak = higher
    acc = acc / tl.where(total > 0, total, 1.0)
    target = out + token * out_token + head * out_head + dims
    tl.store(target, rounded(acc, out.dtype.element_ty, WIDEN), mask=dims < V_DIM)


def merge_splits(
    partial: Tensor,
    log_total: Tensor,
    out: Tensor,
    query_starts: Tensor,
    rows: Tensor,
    sinks: Tensor | None,
    chip: Chip | None = None,
) -> None:
    """Fill the rows of `out` that belong to the requests `rows` [n]; see the file's head for shapes. KernelError."""
    count, heads, splits, v_dim = partial.shape
    check(NAME, "partial", partial, (count, heads, splits, v_dim), (torch.float32,), out, dense=True)
    check(NAME, "log_total", log_total, (count, heads, splits), (torch.float32,), out, dense=True)
    check(NAME, "out", out, (None, heads, v_dim), FLOATS, out)
    check(NAME, "rows", rows, (count,), INTS, out, dense=True)
    if sinks is not None:
        check(NAME, "sinks", sinks, (heads,), FLOATS, out, dense=True)
    chip = chip or chip_of(out)
    args = {
        "partial": partial,
        "log_total": log_total,
        "out": out,
        "query_starts": query_starts,
        "rows": rows,
        "sinks": sinks,
        "out_token": out.stride(0),
        "out_head": out.stride(1),
        "splits": splits,
        "heads": heads,
        "V_DIM": v_dim,
        "V_PAD": pow2(v_dim),
        "STEP": STEP,
        "WIDEN": chip.interpreted,
    }
    warps = max(1, min(4, STEP * pow2(v_dim) // 4 // chip.target.warp_size))
    chip.run(Launch(merge_splits_kernel, (count, heads), args, warps))
