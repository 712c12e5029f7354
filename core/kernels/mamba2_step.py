"""One decode step of Mamba-2: the state of each request moves on by a token and gives its output.

    dt = softplus(dt + dt_bias), clamped to [dt_min, dt_max]
    S' = e^(dt A) S + dt x B^T          y = S' C + D x          y *= silu(z), if z is given

state [slots, heads, head_dim, states] float32, moved in place; x, z, y [requests, heads, head_dim]
dt [requests, heads]
A, D, dt_bias [heads] (A negative); B, C [requests, groups, states], a group shared by heads / groups heads;
slots [requests], one below 0 is skipped. Dao and Gu 2024, "Transformers are SSMs".

A program moves BLOCK_P rows of one head's state. Registers: BLOCK_P * states / threads floats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.kernels.checks import FLOATS, INTS, check, pow2, require
from core.kernels.chip import Chip, Launch, chip_of
from core.kernels.numbers import rounded, sigmoid

NAME = "mamba2_step"
BLOCK_P = 32


@triton.jit
def mamba2_step_kernel(
    state: tl.tensor,
    x: tl.tensor,
    z: tl.tensor,
    dt: tl.tensor,
    dt_bias: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    d: tl.tensor,
    slots: tl.tensor,
    y: tl.tensor,
    dt_min: tl.tensor,
    dt_max: tl.tensor,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STATES: tl.constexpr,
    STATES_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + request).to(tl.int64)
    if slot >= 0:
        p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
        n = tl.arange(0, STATES_PAD)
        row = request * HEADS + head
        step = tl.load(dt + row).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
        step = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
        step = tl.minimum(tl.maximum(step, dt_min), dt_max)
        group = (request * GROUPS + head // (HEADS // GROUPS)) * STATES
        into = tl.load(b + group + n, mask=n < STATES, other=0.0).to(tl.float32)
        from_ = tl.load(c + group + n, mask=n < STATES, other=0.0).to(tl.float32)
        value = tl.load(x + row * HEAD_DIM + p, mask=p < HEAD_DIM, other=0.0).to(tl.float32)
        there = (p < HEAD_DIM)[:, None] & (n < STATES)[None, :]
        place = state + ((slot * HEADS + head) * HEAD_DIM + p[:, None]) * STATES + n[None, :]
        s = tl.load(place, mask=there, other=0.0)
        s = s * tl.exp(step * tl.load(a + head).to(tl.float32)) + (step * value)[:, None] * into[None, :]
        tl.store(place, s, mask=there)
        out = tl.sum(s * from_[None, :], 1) + tl.load(d + head).to(tl.float32) * value
        if z is not None:
            gate = tl.load(z + row * HEAD_DIM + p, mask=p < HEAD_DIM, other=0.0).to(tl.float32)
            out *= gate * sigmoid(gate)
        tl.store(y + row * HEAD_DIM + p, rounded(out, y.dtype.element_ty, WIDEN), mask=p < HEAD_DIM)


def mamba2_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    slots: Tensor,
    y: Tensor,
    z: Tensor | None = None,
    dt_limits: tuple[float, float] = (0.0, float("inf")),
    chip: Chip | None = None,
) -> None:
    """Move `state` at `slots` on by one token and fill y; shapes are at the file's head. Raises KernelError."""
    requests, heads, head_dim = x.shape
    groups, states = b.shape[1:]
    require(NAME, heads % groups == 0, f"{groups} groups of B and C do not divide {heads} heads.")
    check(NAME, "x", x, (requests, heads, head_dim), FLOATS, x, dense=True)
    check(NAME, "y", y, (requests, heads, head_dim), FLOATS, x, dense=True)
    check(NAME, "dt", dt, (requests, heads), FLOATS, x, dense=True)
    for name, tensor in (("dt_bias", dt_bias), ("a", a), ("d", d)):
        check(NAME, name, tensor, (heads,), FLOATS, x, dense=True)
    for name, tensor in (("b", b), ("c", c)):
        check(NAME, name, tensor, (requests, groups, states), FLOATS, x, dense=True)
    check(NAME, "state", state, (None, heads, head_dim, states), (torch.float32,), x, dense=True)
    check(NAME, "slots", slots, (requests,), INTS, x, dense=True)
    if z is not None:
        check(NAME, "z", z, (requests, heads, head_dim), FLOATS, x, dense=True)
    chip = chip or chip_of(x)
    block_p = min(BLOCK_P, pow2(head_dim))
    args = {
        "state": state,
        "x": x,
        "z": z,
        "dt": dt,
        "dt_bias": dt_bias,
        "a": a,
        "b": b,
        "c": c,
        "d": d,
        "slots": slots,
        "y": y,
        "dt_min": dt_limits[0],
        "dt_max": dt_limits[1],
        "HEADS": heads,
        "GROUPS": groups,
        "HEAD_DIM": head_dim,
        "STATES": states,
        "STATES_PAD": pow2(states),
        "BLOCK_P": block_p,
        "WIDEN": chip.interpreted,
    }
    chip.run(Launch(mamba2_step_kernel, (requests, heads, -(-head_dim // block_p)), args))
