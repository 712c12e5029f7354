"""A linear layer whose weight is kept in 4 or 8 bits: y = x @ w.T + bias.

    w[n, k] = (code[n, k] - zero[n, k // group]) * scale[n, k // group] + offset[n, k // group]
    w[n, k] = table[code[n, k]] * scale[n, k // group]          NF4 and its like; float8, whose 256 values are a table

x [rows, in]; codes of 4 bits: uint8 [out, in / 2], the even k in the low nibble; of 8 bits: uint8 or int8 [out, in]
scale, zero or None, offset or None [out, groups]; group 32, 64, 128, ... or the whole row (groups = 1); bias [out]
AWQ: Lin et al. 2023; GPTQ: Frantar et al. 2022. int8 with one scale a row: Dettmers et al. 2022, weights only. NF4:
Dettmers et al. 2023.

A program makes BLOCK_M x BLOCK_N outputs; codes become x's dtype in registers, sums are float32 on tensor cores.
BLOCK_K divides the group, so that one column of scales serves a step. Shared memory: the tiles of x and of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.kernels.checks import FLOATS, check, require
from core.kernels.chip import Chip, Launch, Target, chip_of
from core.kernels.numbers import dot, rounded

NAME = "dequant_matmul"
FEW = 16  # rows of the smallest tile


@dataclass(frozen=True)
class Codes:
    """A quantized weight; shapes are at the file's head."""

    codes: Tensor
    scales: Tensor
    bits: int
    group: int  # columns that share a scale; the last ones may be fewer
    columns: int
    zeros: Tensor | None = None
    offsets: Tensor | None = None
    middle: int | None = None  # the zero of all groups
    table: Tensor | None = None  # [2 ** bits] float32

    @property
    def outputs(self) -> int:
        return self.codes.shape[0]

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group)


@dataclass(frozen=True)
class Tile:
    """What a program makes: `rows` x `outputs`, `columns` of the weight at a time."""

    rows: int
    outputs: int
    columns: int
    num_warps: int
    num_stages: int


HOPPER = 90
# By rows, where 128 columns share a scale; timed on an H200.
ON_HOPPER = {16: Tile(16, 32, 128, 4, 3), 64: Tile(64, 64, 128, 4, 3)}
MANY_ON_HOPPER = Tile(128, 128, 64, 8, 3)


def choose_tile(rows: int, half: bool, weight: Codes, target: Target) -> Tile:
    wide = weight.groups == 1 or weight.group % 128 == 0
    if target.arch == HOPPER and half and wide and weight.table is None:
        return next((tile for most, tile in ON_HOPPER.items() if rows <= most), MANY_ON_HOPPER)
    few = rows <= FEW
    columns = 64 if half and (weight.groups == 1 or weight.group % 64 == 0) else 32
    return Tile(
        rows=FEW if few else 64 if half else 32,
        outputs=32 if not half else 128 if few else 64,
        columns=columns,
        num_warps=2 if few and target.backend == "hip" else 4,
        num_stages=2 if weight.table is not None and columns == 32 else 3,  # addresses in the table take registers
    )


def unfit(weight: Codes) -> str | None:
    """Say why the kernel does not take a weight, None if it does."""
    if weight.bits not in (4, 8):
        return f"bits must be 4 or 8, got {weight.bits}."
    if weight.bits == 4 and weight.columns % 2:
        return f"4-bit codes come in pairs, but there are {weight.columns} columns."
    if weight.groups > 1 and weight.group % 32:
        return f"groups of {weight.group} columns; they must be a multiple of 32, or the whole row."
    parts = [weight.codes, weight.scales, weight.zeros, weight.offsets]
    if not all(part.is_contiguous() for part in parts if part is not None):
        return "codes, scales, zeros and offsets must be contiguous."
    if weight.scales.dtype not in FLOATS:
        return f"scales of {weight.scales.dtype}; they must be float32, bfloat16 or float16."
    return None


@triton.jit
def group_column(base: tl.tensor, out: tl.tensor, there: tl.tensor, groups: tl.tensor, group: tl.tensor) -> tl.tensor:
    """Load one number for each output, as a column, float32."""
    return tl.load(base + out.to(tl.int64) * groups + group, mask=there, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["rows", "groups"])
def dequant_matmul_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    offsets: tl.tensor,
    table: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    x_row: tl.tensor,
    y_row: tl.tensor,
    codes_row: tl.tensor,
    groups: tl.tensor,
    columns: tl.tensor,
    bytes_: tl.tensor,
    out: tl.tensor,
    group: tl.tensor,
    BITS: tl.constexpr,
    MIDDLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        part = tl.load(
            x + m.to(tl.int64)[:, None] * x_row + k[None, :],
            mask=(m < rows)[:, None] & (k < columns)[None, :],
            other=0.0,
        )
        if BITS == 4:
            pair = start // 2 + tl.arange(0, BLOCK_K // 2)
            there = (n < out)[:, None] & (pair < bytes_)[None, :]
            two = tl.load(codes + n.to(tl.int64)[:, None] * codes_row + pair[None, :], mask=there, other=0)
            code = tl.interleave(two & 15, two >> 4)
        else:
            there = (n < out)[:, None] & (k < columns)[None, :]
            code = tl.load(codes + n.to(tl.int64)[:, None] * codes_row + k[None, :], mask=there, other=0)
        if table is not None:
            code = tl.load(table + code.to(tl.int32))
        else:
            code = code.to(tl.float32) - MIDDLE
        if zeros is not None:
            code -= group_column(zeros, n, n < out, groups, start // group)
        weight = code * group_column(scales, n, n < out, groups, start // group)
        if offsets is not None:
            weight += group_column(offsets, n, n < out, groups, start // group)
        acc = dot(part, tl.trans(rounded(weight, x.dtype.element_ty, WIDEN)), acc, WIDEN)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < out, other=0.0).to(tl.float32)[None, :]
    target = y + m.to(tl.int64)[:, None] * y_row + n[None, :]
    tl.store(target, rounded(acc, y.dtype.element_ty, WIDEN), mask=(m < rows)[:, None] & (n < out)[None, :])


def dequant_matmul(
    x: Tensor,
    weight: Codes,
    y: Tensor,
    bias: Tensor | None = None,
    chip: Chip | None = None,
    tile: Tile | None = None,
) -> None:
    """Fill y [rows, out] with x [rows, in] times the weight that the codes stand for; see the head.

    `tile`: None = from `choose_tile`. Raises KernelError.
    """
    rows, size = x.shape
    outputs, groups = weight.outputs, weight.groups
    reason = unfit(weight)
    require(NAME, reason is None, str(reason))
    check(NAME, "x", x, (rows, weight.columns), FLOATS, x)
    check(NAME, "y", y, (rows, outputs), (x.dtype,), x)
    kinds = (torch.uint8,) if weight.bits == 4 else (torch.uint8, torch.int8)
    check(NAME, "codes", weight.codes, (outputs, size * weight.bits // 8), kinds, x, dense=True)
    check(NAME, "scales", weight.scales, (outputs, groups), FLOATS, x, dense=True)
    for name, tensor in (("zeros", weight.zeros), ("offsets", weight.offsets)):
        if tensor is not None:
            check(NAME, name, tensor, (outputs, groups), (*FLOATS, torch.uint8, torch.int8), x, dense=True)
    if weight.table is not None:
        check(NAME, "table", weight.table, (2**weight.bits,), (torch.float32,), x, dense=True)
    if bias is not None:
        check(NAME, "bias", bias, (outputs,), FLOATS, x, dense=True)
    chip = chip or chip_of(x)
    half = x.element_size() == 2
    tile = tile or choose_tile(rows, half, weight, chip.target)
    args = {
        "x": x,
        "codes": weight.codes,
        "scales": weight.scales,
        "zeros": weight.zeros,
        "offsets": weight.offsets,
        "table": weight.table,
        "bias": bias,
        "y": y,
        "rows": rows,
        "x_row": x.stride(0),
        "y_row": y.stride(0),
        "codes_row": weight.codes.stride(0),
        "groups": groups,
        "columns": size,
        "bytes_": size * weight.bits // 8,  # of a row; an argument, so that the compiler knows what divides it
        "out": outputs,
        "group": weight.group,
        "BITS": weight.bits,
        "MIDDLE": weight.middle or 0,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.outputs,
        "BLOCK_K": tile.columns,
        "WIDEN": chip.interpreted,
    }
    grid = (-(-outputs // tile.outputs), -(-rows // tile.rows))
    chip.run(Launch(dequant_matmul_kernel, grid, args, tile.num_warps, tile.num_stages, uses_tensor_cores=half))
