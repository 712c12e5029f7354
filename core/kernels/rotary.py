"""Rotary position embedding of Q or K, over all of a head's width or its first part (Su et al. 2021, RoFormer).

    (a, b) -> (a cos - b sin, b cos + a sin)     for the pairs of dimensions
    halves        (i, i + rotated / 2)           GPT-NeoX, Llama
    interleaved   (2 i, 2 i + 1)                 GPT-J, ChatGLM
    dimensions from `rotated` on are copied

x, out [tokens, heads, dim], `out` may be x; cos, sin [tokens, rotated / 2]. Computed in float32; products are rounded
before they are added, as torch's operators one after the other do.
A program rotates one token's heads, HEADS at a time. Registers: a few elements a thread. Shared memory: none for
halves; interleaved pairs are put together in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from core.kernels.checks import FLOATS, check, pow2, require
from core.kernels.chip import Chip, Launch, chip_of
from core.kernels.numbers import rounded

NAME = "rotary"
PAIRS = 1024  # of a program, so that a thread loads 16 bytes of each half


@triton.jit
def turn(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, s: tl.tensor, dtype: tl.constexpr, WIDEN: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The pairs (a, b) turned; float32."""
    first = rounded(a * c, dtype, WIDEN).to(tl.float32) - rounded(b * s, dtype, WIDEN).to(tl.float32)
    second = rounded(b * c, dtype, WIDEN).to(tl.float32) + rounded(a * s, dtype, WIDEN).to(tl.float32)
    return first, second


@triton.jit(do_not_specialize=["count"])
def rotary_kernel(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    out_token: tl.tensor,
    out_head: tl.tensor,
    angle_token: tl.tensor,
    count: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,
    COPIES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    source = x + token * x_token + head[:, None] * x_head
    target = out + token * out_token + head[:, None] * out_head
    pair = tl.arange(0, HALF_PAD)
    there = (head < count)[:, None] & (pair < HALF)[None, :]
    c = tl.load(cos + token * angle_token + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * angle_token + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF_PAD)
        there = (head < count)[:, None] & (both < 2 * HALF)[None, :]
        pairs = tl.load(source + both[None, :], mask=there, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(pairs, [HEADS, HALF_PAD, 2]))
        turned = tl.interleave(*turn(a, b, c, s, out.dtype.element_ty, WIDEN))
        tl.store(target + both[None, :], rounded(turned, out.dtype.element_ty, WIDEN), mask=there)
    else:
        a = tl.load(source + pair[None, :], mask=there, other=0.0).to(tl.float32)
        b = tl.load(source + HALF + pair[None, :], mask=there, other=0.0).to(tl.float32)
        first, second = turn(a, b, c, s, out.dtype.element_ty, WIDEN)
        tl.store(target + pair[None, :], rounded(first, out.dtype.element_ty, WIDEN), mask=there)
        tl.store(target + HALF + pair[None, :], rounded(second, out.dtype.element_ty, WIDEN), mask=there)
    if COPIES:
        rest = 2 * HALF + tl.arange(0, REST_PAD)
        there = (head < count)[:, None] & (rest < DIM)[None, :]
        tl.store(target + rest[None, :], tl.load(source + rest[None, :], mask=there), mask=there)


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, interleaved: bool = False, chip: Chip | None = None
) -> None:
    """Fill `out` [tokens, heads, dim] with x rotated by cos and sin [tokens, rotated / 2]. Raises KernelError."""
    tokens, count, dim = x.shape
    half = cos.shape[-1]
    check(NAME, "x", x, (tokens, count, dim), FLOATS, x)
    check(NAME, "out", out, (tokens, count, dim), (x.dtype,), x)
    check(NAME, "cos", cos, (tokens, half), FLOATS, x)
    check(NAME, "sin", sin, (tokens, half), (cos.dtype,), x)
    require(NAME, cos.stride() == sin.stride(), f"cos and sin have strides {cos.stride()} and {sin.stride()}.")
    require(
        NAME, 0 < 2 * half <= dim, f"cos has {half} columns, so {2 * half} of a head's {dim} dimensions would turn."
    )
    chip = chip or chip_of(x)
    heads = min(pow2(count), max(1, PAIRS // pow2(half)), max(1, 16 * PAIRS // pow2(dim)))
    warps = max(1, min(128, heads * pow2(half) // 8) // chip.target.warp_size)
    args = {
        "x": x,
        "cos": cos,
        "sin": sin,
        "out": out,
        "x_token": x.stride(0),
        "x_head": x.stride(1),
        "out_token": out.stride(0),
        "out_head": out.stride(1),
        "angle_token": cos.stride(0),
        "count": count,
        "HEADS": heads,
        "DIM": dim,
        "HALF": half,
        "HALF_PAD": pow2(half),
        "REST_PAD": pow2(max(1, dim - 2 * half)),
        "COPIES": 2 * half < dim and out is not x,
        "INTERLEAVED": interleaved,
        "WIDEN": chip.interpreted,
    }
    wide = heads * half >= 8 * warps * chip.target.warp_size  # few and narrow heads leave a lane less than 16 bytes
    chip.run(Launch(rotary_kernel, (tokens, -(-count // heads)), args, warps, loads_wide=wide, fuses=False))
