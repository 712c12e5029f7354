"""What prefill and decode attention share on the host: the step's tensors, their checks, and the choice of tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core.contracts import AttentionArgs
from core.kernels.checks import FLOATS, INTS, check, require, split_width
from core.kernels.chip import LOG2E, Chip, Target

WIDTHS = (64, 128, 256, 1024)  # rows of the tables: the padded width of K or V, the wider one


@dataclass(frozen=True)
class Tile:
    """How the work is cut: rows of queries (token and head) and keys a program takes at a time."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# By padded width, for each kind of chip and dtype. "wgmma": half types on Hopper, whose tensor cores read shared
# memory; "tcgen05": half types on Blackwell, where 64 keys spill at width 64 and 128 do not; "mma": half types before,
# all operands in registers; "amd": half types, 64 KiB of shared memory, warps of 64; "float32": without tensor cores,
# since their tf32 would not be float32. `core-serve kernels compile` holds them to what the chips have.
PREFILL = {
    "wgmma": (Tile(128, 64, 8, 2), Tile(128, 128, 8, 3), Tile(64, 32, 4, 2), Tile(32, 16, 8, 1)),
    "tcgen05": (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 16, 8, 1)),
    "mma": (Tile(64, 64, 4, 3), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 16, 8, 1)),
    "amd": (Tile(128, 64, 8, 1), Tile(64, 64, 4, 1), Tile(64, 32, 8, 1), Tile(32, 16, 4, 1)),
    "float32": (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
DECODE = {
    "wgmma": (Tile(16, 128, 4, 2), Tile(16, 64, 4, 3), Tile(16, 32, 4, 1), Tile(16, 16, 4, 2)),
    "tcgen05": (Tile(16, 128, 4, 2), Tile(16, 64, 4, 2), Tile(16, 32, 4, 1), Tile(16, 16, 4, 2)),
    "mma": (Tile(16, 128, 4, 2), Tile(16, 64, 4, 2), Tile(16, 32, 4, 2), Tile(16, 16, 4, 2)),
    "amd": (Tile(16, 64, 4, 1), Tile(16, 64, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)),
    "float32": (Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
ADDRESSES = 4096  # in a tile, at the most
INTERPRETED = Tile(64, 64, 4, 1)  # few programs: each takes milliseconds


@dataclass(frozen=True)
class PagedCall:
    """One layer's cache and one step's requests, as the kernels take them."""

    keys: Tensor  # [blocks, block_size, kv_heads, k_dim]
    values: Tensor  # [blocks, block_size, kv_heads, v_dim]
    tables: Tensor  # [requests, most blocks] int32 or int64
    query_starts: Tensor  # [requests + 1] int32
    context_lens: Tensor  # [requests] int32, the new tokens included
    tile: Tile | None = None  # None: from the table

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[2]

    @property
    def block_size(self) -> int:
        return self.keys.shape[1]


def prefill_tile(call: PagedCall, q: Tensor, args: AttentionArgs, target: Target) -> Tile:
    return call.tile or choose_tile(PREFILL, call, q, args, target)


def decode_tile(call: PagedCall, q: Tensor, args: AttentionArgs, target: Target) -> Tile:
    return call.tile or choose_tile(DECODE, call, q, args, target)


def choose_tile(
    table: Mapping[str, tuple[Tile, ...]], call: PagedCall, q: Tensor, args: AttentionArgs, target: Target
) -> Tile:
    """Look up the tile for the wider of K and V, the dtype of q and the chip.

    With a table of biases there is an address for each score, which takes registers: half the keys or less,
    and two stages.
    """
    if target.backend == "cpu":
        return INTERPRETED
    widest = max(sum(split_width(cache.shape[-1])) for cache in (call.keys, call.values))
    if widest > WIDTHS[-1]:
        require("attention", False, f"K or V of width {widest} is wider than {WIDTHS[-1]}, the widest there is.")
    kind = "float32" if q.element_size() == 4 else tile_kind(target)
    tile = next(tile for width, tile in zip(WIDTHS, table[kind], strict=True) if widest <= width)
    if bias_distances(args) == 0:
        return tile
    keys = max(16, min(tile.keys // 2, ADDRESSES // tile.rows))
    return replace(tile, keys=keys, num_stages=min(2, tile.num_stages))


def bias_distances(args: AttentionArgs) -> int:
    """Return the columns of a table of biases, 0 if there is none."""
    return args.bias.shape[1] if args.bias is not None and args.bias.dim() == 2 else 0


def tile_kind(target: Target) -> str:
    """Return which rows of the tables hold for half types."""
    if target.backend == "hip":
        return "amd"
    return {90: "wgmma", 100: "tcgen05"}.get(int(target.arch), "mma")


def check_paged(kernel: str, q: Tensor, out: Tensor, call: PagedCall, args: AttentionArgs) -> None:
    """Raise KernelError, naming the argument, unless all shapes, dtypes and devices fit together."""
    tokens, heads, k_dim = q.shape
    v_dim, requests = call.values.shape[-1], call.tables.shape[0]
    check(kernel, "q", q, (tokens, heads, k_dim), FLOATS, q)
    check(kernel, "out", out, (tokens, heads, v_dim), (q.dtype,), q)
    check(kernel, "keys", call.keys, (None, None, None, k_dim), FLOATS, q)
    check(kernel, "values", call.values, (*call.keys.shape[:3], v_dim), (call.keys.dtype,), q)
    check(kernel, "tables", call.tables, (requests, None), INTS, q)
    check(kernel, "query_starts", call.query_starts, (requests + 1,), (torch.int32,), q, dense=True)
    check(kernel, "context_lens", call.context_lens, (requests,), (torch.int32,), q, dense=True)
    require(kernel, heads % call.kv_heads == 0, f"{heads} query heads do not divide into {call.kv_heads} K/V heads.")
    require(kernel, args.causal, "attention to later tokens (causal=False) is not supported.")
    if args.sinks is not None:
        check(kernel, "sinks", args.sinks, (heads,), FLOATS, q, dense=True)
    if args.bias is not None:
        check(kernel, "bias", args.bias, (heads, None)[: args.bias.dim()], FLOATS, q, dense=True)


def attention_constants(
    q: Tensor, out: Tensor, call: PagedCall, args: AttentionArgs, tile: Tile, chip: Chip
) -> dict[str, Any]:
    """Return the arguments that both kernels take, by name."""
    k_main, k_rest = split_width(q.shape[-1])
    v_main, v_rest = split_width(out.shape[-1])
    capped = args.softcap is not None
    distances = bias_distances(args)
    return {
        "q": q,
        "out": out,
        "keys": call.keys,
        "values": call.values,
        "tables": call.tables,
        "query_starts": call.query_starts,
        "context_lens": call.context_lens,
        "sinks": args.sinks,
        "bias": args.bias,
        "distances": distances,
        "q_token": q.stride(0),
        "q_head": q.stride(1),
        "out_token": out.stride(0),
        "out_head": out.stride(1),
        "keys_block": call.keys.stride(0),
        "keys_slot": call.keys.stride(1),
        "keys_head": call.keys.stride(2),
        "values_block": call.values.stride(0),
        "values_slot": call.values.stride(1),
        "values_head": call.values.stride(2),
        "tables_row": call.tables.stride(0),
        "scale": args.scaling / args.softcap if args.softcap is not None else args.scaling * LOG2E,
        "cap": (args.softcap or 0.0) * LOG2E,
        "window": args.window or 0,
        "chunk": args.chunk or 0,
        "group": q.shape[1] // call.kv_heads,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "BLOCK_SIZE": call.block_size,
        "K_DIM": q.shape[-1],
        "K_MAIN": k_main,
        "K_REST": k_rest,
        "V_DIM": out.shape[-1],
        "V_MAIN": v_main,
        "V_REST": v_rest,
        "WINDOW": args.window is not None,
        "CHUNK": args.chunk is not None,
        "SOFTCAP": capped,
        "TABLE": distances > 0,
        "WIDEN": chip.interpreted,
    }


def splits_for(longest: int, split: int) -> int:
    """Return how many splits of `split` keys cover the longest context."""
    return max(1, math.ceil(longest / split))
