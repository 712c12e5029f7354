"""Write the K and V of a step's tokens to their slots in the paged cache.

    keys[slot // block_size, slot % block_size] = k[token], values likewise, for every token with slot >= 0

k [tokens, kv_heads, k_dim], v [tokens, kv_heads, v_dim], slots [tokens]
keys [blocks, block_size, kv_heads, k_dim], values likewise, by strides: any order of the first three will do
Paged K/V: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention".

A program moves one token's K and V of a few heads, about a thousand elements, so that a thread moves 16 bytes at a
time. Registers: 8 elements a thread. Shared memory: none.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from core.kernels.checks import FLOATS, INTS, check, pow2
from core.kernels.chip import Chip, Launch, chip_of
from core.kernels.numbers import rounded

NAME = "write_kv"
ELEMENTS = 1024  # of a program


@triton.jit(do_not_specialize=["kv_heads"])
def write_kv_kernel(
    k: tl.tensor,
    v: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    slots: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    keys_block: tl.tensor,
    keys_slot: tl.tensor,
    keys_head: tl.tensor,
    values_block: tl.tensor,
    values_slot: tl.tensor,
    values_head: tl.tensor,
    kv_heads: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    K_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        block = slot // BLOCK_SIZE
        offset = slot % BLOCK_SIZE
        dims = tl.arange(0, K_PAD)
        there = (heads < kv_heads)[:, None] & (dims < K_DIM)[None, :]
        row = tl.load(k + token * k_token + heads[:, None] * k_head + dims[None, :], mask=there)
        target = keys + block * keys_block + offset * keys_slot + heads[:, None] * keys_head + dims[None, :]
        tl.store(target, rounded(row, keys.dtype.element_ty, WIDEN), mask=there)
        dims = tl.arange(0, V_PAD)
        there = (heads < kv_heads)[:, None] & (dims < V_DIM)[None, :]
        row = tl.load(v + token * v_token + heads[:, None] * v_head + dims[None, :], mask=there)
        target = values + block * values_block + offset * values_slot + heads[:, None] * values_head + dims[None, :]
        tl.store(target, rounded(row, values.dtype.element_ty, WIDEN), mask=there)


def write_kv(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, chip: Chip | None = None) -> None:
    """Write k and v [tokens, kv_heads, dim] to `slots` [tokens] of keys and values; a slot below 0 is skipped.

    The cache's dtype may differ; values are rounded to it. Raises KernelError.
    """
    tokens, kv_heads, k_dim = k.shape
    v_dim, block_size = v.shape[-1], keys.shape[1]
    check(NAME, "k", k, (tokens, kv_heads, k_dim), FLOATS, k)
    check(NAME, "v", v, (tokens, kv_heads, v_dim), FLOATS, k)
    check(NAME, "keys", keys, (None, block_size, kv_heads, k_dim), FLOATS, k)
    check(NAME, "values", values, (keys.shape[0], block_size, kv_heads, v_dim), (keys.dtype,), k)
    check(NAME, "slots", slots, (tokens,), INTS, k, dense=True)
    chip = chip or chip_of(k)
    widest = max(pow2(k_dim), pow2(v_dim))
    heads = min(pow2(kv_heads), max(1, ELEMENTS // widest))
    args = {
        "k": k,
        "v": v,
        "keys": keys,
        "values": values,
        "slots": slots,
        "k_token": k.stride(0),
        "k_head": k.stride(1),
        "v_token": v.stride(0),
        "v_head": v.stride(1),
        "keys_block": keys.stride(0),
        "keys_slot": keys.stride(1),
        "keys_head": keys.stride(2),
        "values_block": values.stride(0),
        "values_slot": values.stride(1),
        "values_head": values.stride(2),
        "BLOCK_SIZE": block_size,
        "kv_heads": kv_heads,
        "K_DIM": k_dim,
        "V_DIM": v_dim,
        "HEADS": heads,
        "K_PAD": pow2(k_dim),
        "V_PAD": pow2(v_dim),
        "WIDEN": chip.interpreted,
    }
    warps = max(1, min(ELEMENTS, heads * widest) // 8 // chip.target.warp_size)
    chip.run(Launch(write_kv_kernel, (tokens, -(-kv_heads // heads)), args, warps))
