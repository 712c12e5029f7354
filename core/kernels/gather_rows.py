"""Pick rows out of a matrix: out[i] = x[rows[i]]; the tokens whose logits are wanted, before the head multiplies them.

x [tokens, size], rows [n], out [n, size]. A program copies BLOCK elements: 8 a thread. Shared memory: none.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from core.kernels.checks import FLOATS, INTS, check
from core.kernels.chip import Chip, Launch, chip_of

NAME = "gather_rows"
BLOCK = 1024


@triton.jit
def gather_rows_kernel(
    x: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    x_row: tl.tensor,
    out_row: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(rows + row).to(tl.int64)
    found = tl.load(x + source * x_row + place, mask=place < size)
    tl.store(out + row * out_row + place, found, mask=place < size)


def gather_rows(x: Tensor, rows: Tensor, out: Tensor, chip: Chip | None = None) -> None:
    """Fill `out` [n, size] with the rows [n] of x [tokens, size]; they must exist. Raises KernelError."""
    count, size = out.shape
    check(NAME, "x", x, (None, size), FLOATS, x)
    check(NAME, "rows", rows, (count,), INTS, x, dense=True)
    check(NAME, "out", out, (count, size), (x.dtype,), x)
    chip = chip or chip_of(x)
    args = {
        "x": x,
        "rows": rows,
        "out": out,
        "x_row": x.stride(0),
        "out_row": out.stride(0),
        "size": size,
        "BLOCK": BLOCK,
    }
    warps = 128 // chip.target.warp_size
    chip.run(Launch(gather_rows_kernel, (count, -(-size // BLOCK)), args, num_warps=warps))
