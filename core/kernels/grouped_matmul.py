"""Experts of a mixture: rows sorted by expert, each block of rows times its own expert's weight.

    y[r] = x[source[r]] @ weights[e].T + bias[e]     for the rows r in [starts[e], starts[e + 1])

x [tokens, in]; source [rows] int32 or None (x is sorted already); weights [experts, out, in], either of the last two
without gaps; starts [experts + 1]
int32, on the device: nobody waits to learn how tokens were routed. y [rows, out].
Gale et al. 2022, "MegaBlocks", in dense tiles.

    program t, m      experts with 5, 0, 70 rows, BLOCK_M = 64        tiles of expert: 1, 0, 2
    tile 0 -> expert 0, rows 0-4     tile 1 -> expert 2, rows 5-68     tile 2 -> expert 2, rows 69-74

The grid has one tile more for each expert than the rows fill; those without rows end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.kernels.checks import FLOATS, check, pow2, require
from core.kernels.chip import Chip, Launch, chip_of
from core.kernels.numbers import dot, rounded

NAME = "grouped_matmul"


@triton.jit(do_not_specialize=["count"])
def grouped_matmul_kernel(
    x: tl.tensor,
    source: tl.tensor,
    weights: tl.tensor,
    bias: tl.tensor,
    starts: tl.tensor,
    y: tl.tensor,
    x_row: tl.tensor,
    y_row: tl.tensor,
    weights_expert: tl.tensor,
    weights_row: tl.tensor,
    weights_column: tl.tensor,
    count: tl.tensor,
    columns: tl.tensor,
    out: tl.tensor,
    EXPERTS_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    tile = tl.program_id(1)
    experts = tl.arange(0, EXPERTS_PAD)
    first = tl.load(starts + experts, mask=experts < count, other=0)
    after = tl.load(starts + experts + 1, mask=experts < count, other=0)
    tiles = (after - first + BLOCK_M - 1) // BLOCK_M
    done = tl.cumsum(tiles, 0)  # tiles of this expert and those before it
    expert = tl.sum((done <= tile).to(tl.int32), 0)
    if expert < count:
        before = tl.sum(tl.where(experts < expert, tiles, 0), 0)
        m = tl.load(starts + expert) + (tile - before) * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = m < tl.load(starts + expert + 1)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        row = m
        if source is not None:
            row = tl.load(source + m, mask=valid, other=0)
        weight = weights + expert.to(tl.int64) * weights_expert
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, columns, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            there = valid[:, None] & (k < columns)[None, :]
            part = tl.load(x + row.to(tl.int64)[:, None] * x_row + k[None, :], mask=there, other=0.0)
            there = (n < out)[:, None] & (k < columns)[None, :]
            w = tl.load(
                weight + n.to(tl.int64)[:, None] * weights_row + k[None, :] * weights_column, mask=there, other=0.0
            )
            acc = dot(part, tl.trans(w), acc, WIDEN)
        if bias is not None:
            acc += tl.load(bias + expert * out + n, mask=n < out, other=0.0).to(tl.float32)[None, :]
        target = y + m.to(tl.int64)[:, None] * y_row + n[None, :]
        tl.store(target, rounded(acc, y.dtype.element_ty, WIDEN), mask=valid[:, None] & (n < out)[None, :])


def grouped_matmul(
    x: Tensor,
    weights: Tensor,
    starts: Tensor,
    y: Tensor,
    source: Tensor | None = None,
    bias: Tensor | None = None,
    chip: Chip | None = None,
) -> None:
    """Fill y [rows, out]; rows from starts[-1] on are not touched. See the file's head. Raises KernelError."""
    rows, outputs = y.shape
    experts, _, size = weights.shape
    check(NAME, "x", x, (rows if source is None else None, size), FLOATS, x)
    upright = weights if weights.stride(2) == 1 else weights.transpose(1, 2)  # one of the two has no gaps
    check(NAME, "weights", upright, (experts, *upright.shape[1:]), (x.dtype,), x)
    require(NAME, weights.shape[1] == outputs, f"weights give {weights.shape[1]} columns, and y has {outputs}.")
    check(NAME, "starts", starts, (experts + 1,), (torch.int32,), x, dense=True)
    check(NAME, "y", y, (rows, outputs), (x.dtype,), x)
    if source is not None:
        check(NAME, "source", source, (rows,), (torch.int32,), x, dense=True)
    if bias is not None:
        check(NAME, "bias", bias, (experts, outputs), FLOATS, x, dense=True)
    chip = chip or chip_of(x)
    half = x.element_size() == 2
    block_m = 16 if rows <= 16 * experts else 64 if half else 32
    block_n = 64 if half else 32
    args = {
        "x": x,
        "source": source,
        "weights": weights,
        "bias": bias,
        "starts": starts,
        "y": y,
        "x_row": x.stride(0),
        "y_row": y.stride(0),
        "weights_expert": weights.stride(0),
        "weights_row": weights.stride(1),
        "weights_column": weights.stride(2),
        "count": experts,
        "EXPERTS_PAD": pow2(experts),
        "columns": size,
        "out": outputs,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": 64 if half else 32,
        "WIDEN": chip.interpreted,
    }
    most_tiles = min(rows, rows // block_m + experts)
    chip.run(Launch(grouped_matmul_kernel, (-(-outputs // block_n), most_tiles), args, 4, 3, uses_tensor_cores=half))
