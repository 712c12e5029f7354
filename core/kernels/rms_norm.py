"""RMSNorm of rows, with the residual added before if there is one (Zhang and Sennrich 2019).

    h = x + residual            (written to `residual`, rounded to its dtype, as a model without fusion would)
    y = h / sqrt(mean(h^2) + eps) * weight

x, residual, out [rows, size]; or x and out [tokens, heads, size]; or x [tokens, size] of which out [n, size] takes the
rows [n], the tokens whose logits are wanted, say; weight [size]. Computed in float32. The quotient is rounded to the
weight's dtype: x's, as in Llama; or float32, as in Gemma, whose weight is 1 + the stored one.
One program a row. Registers: size / threads floats. Shared memory: a few floats, for the sum.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.kernels.checks import FLOATS, INTS, check, pow2, require
from core.kernels.chip import Chip, Launch, chip_of
from core.kernels.numbers import rounded

NAME = "rms_norm"


@triton.jit
def rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    picked: tl.tensor,
    x_row: tl.tensor,
    x_head: tl.tensor,
    heads: tl.tensor,
    residual_row: tl.tensor,
    out_row: tl.tensor,
    eps: tl.tensor,
    size: tl.tensor,
    PADDED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PADDED)
    there = place < size
    token = row // heads
    if picked is not None:
        token = tl.load(picked + row).to(tl.int64)
    source = x + token * x_row + row % heads * x_head
    h = tl.load(source + place, mask=there, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + row * residual_row + place, mask=there, other=0.0).to(tl.float32)
        kept = rounded(h, residual.dtype.element_ty, WIDEN)
        tl.store(residual + row * residual_row + place, kept, mask=there)
        h = kept.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(h * h, 0) / size + eps)
    factor = tl.load(weight + place, mask=there, other=0.0).to(tl.float32)
    y = rounded(h * scale, weight.dtype.element_ty, WIDEN).to(tl.float32) * factor
    tl.store(out + row * out_row + place, rounded(y, out.dtype.element_ty, WIDEN), mask=there)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
    chip: Chip | None = None,
) -> None:
    """Fill `out`, and `residual` with x + residual if given; shapes are at the file's head. Raises KernelError."""
    *leading, size = x.shape
    heads = leading[1] if len(leading) == 2 else 1
    count = math.prod(leading) if rows is None else len(rows)
    check(NAME, "x", x, (*leading[:2], size), FLOATS, x)
    check(NAME, "out", out, (*leading, size) if rows is None else (count, size), (x.dtype,), x, dense=True)
    if rows is not None:
        require(
            NAME, residual is None and len(leading) == 1, "rows are picked of x [tokens, size], without a residual."
        )
        check(NAME, "rows", rows, (count,), INTS, x, dense=True)
    check(NAME, "weight", weight, (size,), {torch.float32, x.dtype}, x, dense=True)
    if residual is not None:
        check(NAME, "residual", residual, (count, size), (x.dtype,), x)
    chip = chip or chip_of(x)
    args = {
        "x": x,
        "residual": residual,
        "weight": weight,
        "out": out,
        "picked": rows,
        "x_row": x.stride(0),
        "x_head": x.stride(-2),
        "heads": heads,
        "residual_row": 0 if residual is None else residual.stride(0),
        "out_row": out.stride(-2),
        "eps": eps,
        "size": size,
        "PADDED": pow2(size),
        "WIDEN": chip.interpreted,
    }
    warp = chip.target.warp_size
    wide = size >= 8 * warp  # a shorter row leaves a lane less than 16 bytes of a half type
    chip.run(Launch(rms_norm_kernel, (count,), args, warps_for(pow2(size), warp), loads_wide=wide))


def warps_for(elements: int, warp_size: int) -> int:
    """Return the warps that hold a row with at least 8 elements a thread, at most 32 before there are 16 warps."""
    return min(1024 // warp_size, max(1, pow2(elements) // (8 * warp_size)), 16)
