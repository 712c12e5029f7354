"""Small pieces of arithmetic that several kernels share.

In all kernels a parameter of type tl.tensor is a pointer (or None for what a call leaves out), a scalar or a block.
WIDEN is True in the interpreter only: there, half types are bit patterns that numpy can neither multiply nor round.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, total: tl.tensor, WIDEN: tl.constexpr) -> tl.tensor:
    """total + a @ b; a [m, k], b [k, n], total [m, n] float32.

    "ieee" makes float32 stay float32, without tensor cores (tf32 has 10 bits); half types use them all the same.
    """
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def rounded(x: tl.tensor, dtype: tl.constexpr, WIDEN: tl.constexpr) -> tl.tensor:
    """Any float -> dtype, to nearest even."""
    if WIDEN and dtype == tl.bfloat16:  # the interpreter would cut the bits off instead
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        even = (bits >> 16) & 1
        carried = tl.where(x == x, bits + 0x7FFF + even, bits)  # the carry would turn some NaNs into infinity
        return (carried >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """float32; the series where the quotient would cancel."""
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    small = tl.exp(-2.0 * tl.abs(x))  # of a negative number: no overflow
    far = (1.0 - small) / (1.0 + small)
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0, -far, far))


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """float32."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1.0 + small)
