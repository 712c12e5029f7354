"""One decode step of gated linear attention: the state of each request moves on by a token and answers its query.

    plain        S' = diag(a) S + k v^T                        a = e^decay, by head or by dimension of k
    delta rule   S' = diag(a) S + k (beta (v - (diag(a) S)^T k))^T       if beta is given
    out          scale * S'^T q

state [slots, heads, k_dim, v_dim] float32, moved in place; q, k [requests, heads, k_dim]; v, out [requests, heads,
v_dim]; decay [requests, heads] or [requests, heads, k_dim], log of the gate; beta [requests, heads]; slots [requests]
Yang et al. 2023, "Gated Linear Attention"; Yang et al. 2024, "Gated Delta Networks". A slot below 0 is skipped.

A program moves BLOCK_V columns of one head's state, all of k_dim. Registers: k_dim * BLOCK_V / threads floats.
Shared memory: a column of sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.kernels.checks import FLOATS, INTS, check, pow2, require
from core.kernels.chip import Chip, Launch, chip_of
from core.kernels.numbers import rounded

NAME = "gated_linear_attention"
BLOCK_V = 32


@triton.jit
def gated_linear_attention_kernel(
    state: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    decay: tl.tensor,
    beta: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BY_DIM: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + request).to(tl.int64)
    if slot >= 0:
        row = request * HEADS + head
        i = tl.arange(0, K_PAD)
        j = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
        key = tl.load(k + row * K_DIM + i, mask=i < K_DIM, other=0.0).to(tl.float32)
        query = tl.load(q + row * K_DIM + i, mask=i < K_DIM, other=0.0).to(tl.float32)
        value = tl.load(v + row * V_DIM + j, mask=j < V_DIM, other=0.0).to(tl.float32)
        there = (i < K_DIM)[:, None] & (j < V_DIM)[None, :]
        place = state + (slot * HEADS + head) * K_DIM * V_DIM + i[:, None] * V_DIM + j[None, :]
        s = tl.load(place, mask=there, other=0.0)
        if BY_DIM:
            s *= tl.exp(tl.load(decay + row * K_DIM + i, mask=i < K_DIM, other=0.0).to(tl.float32))[:, None]
        else:
            s *= tl.exp(tl.load(decay + row).to(tl.float32))
        if beta is not None:
            value = tl.load(beta + row).to(tl.float32) * (value - tl.sum(s * key[:, None], 0))
        s += key[:, None] * value[None, :]
        tl.store(place, s, mask=there)
        answer = tl.sum(s * query[:, None], 0) * scale
        tl.store(out + row * V_DIM + j, rounded(answer, out.dtype.element_ty, WIDEN), mask=j < V_DIM)


def gated_linear_attention(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    slots: Tensor,
    out: Tensor,
    scale: float,
    beta: Tensor | None = None,
    chip: Chip | None = None,
) -> None:
    """Move `state` at `slots` on by one token and fill `out`; shapes are at the file's head. Raises KernelError."""
    requests, heads, k_dim = q.shape
    v_dim = v.shape[-1]
    check(NAME, "q", q, (requests, heads, k_dim), FLOATS, q, dense=True)
    check(NAME, "k", k, (requests, heads, k_dim), FLOATS, q, dense=True)
    check(NAME, "v", v, (requests, heads, v_dim), FLOATS, q, dense=True)
    check(NAME, "out", out, (requests, heads, v_dim), FLOATS, q, dense=True)
    check(NAME, "state", state, (None, heads, k_dim, v_dim), (torch.float32,), q, dense=True)
    check(NAME, "slots", slots, (requests,), INTS, q, dense=True)
    require(NAME, decay.dim() in (2, 3), f"decay must be by head or by dimension, got shape {list(decay.shape)}.")
    check(NAME, "decay", decay, (requests, heads, k_dim)[: decay.dim()], FLOATS, q, dense=True)
    if beta is not None:
        check(NAME, "beta", beta, (requests, heads), FLOATS, q, dense=True)
    chip = chip or chip_of(q)
    block_v = min(BLOCK_V, pow2(v_dim))
    args = {
        "state": state,
        "q": q,
        "k": k,
        "v": v,
        "decay": decay,
        "beta": beta,
        "slots": slots,
        "out": out,
        "scale": scale,
        "HEADS": heads,
        "K_DIM": k_dim,
        "V_DIM": v_dim,
        "K_PAD": pow2(k_dim),
        "BLOCK_V": block_v,
        "BY_DIM": decay.dim() == 3,
        "WIDEN": chip.interpreted,
    }
    chip.run(Launch(gated_linear_attention_kernel, (requests, heads, -(-v_dim // block_v)), args))
