"""What all backends share: the cache's memory, the check of arguments, and the meaning of a mask.

The contract itself is `core.contracts.AttentionBackend`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from core.batch import Places
from core.contracts import AttentionArgs, KVSpec
from core.errors import UnsupportedAttention
from core.reach import Reach

NUMPY_DTYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16}


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    """Return zeros; on a CPU they take memory only once they are written (calloc does that, torch.zeros does not)."""
    if device != "cpu" or dtype not in NUMPY_DTYPES:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(tuple(shape), NUMPY_DTYPES[dtype])).view(dtype)


class PagedCache:
    """K/V memory of all layers: keys[layer] [blocks, block_size, kv_heads, k_dim], values[layer] likewise."""

    def __init__(self, specs: Sequence[KVSpec], num_blocks: Sequence[int], block_size: int) -> None:
        self.specs, self.block_size = tuple(specs), block_size
        sizes = list(zip(specs, num_blocks, strict=True))
        self.keys = [self._memory(spec, count, spec.k_dim) for spec, count in sizes]
        self.values = [self._memory(spec, count, spec.v_dim) for spec, count in sizes]

    def _memory(self, spec: KVSpec, num_blocks: int, dim: int) -> Tensor:
        return lazy_zeros((num_blocks, self.block_size, spec.num_kv_heads, dim), spec.dtype, spec.device)

    def write(self, layer: int, places: Places, k: Tensor, v: Tensor) -> None:
        """Store k [tokens, kv_heads, k_dim] and v [tokens, kv_heads, v_dim].

        Blocks are cleared as they are begun: a masked slot counts nothing, but nothing times NaN is NaN.
        """
        keys, values, slots = self.keys[layer], self.values[layer], places.slots
        if places.fresh is not None:
            keys.index_fill_(0, places.fresh, 0)
            values.index_fill_(0, places.fresh, 0)
        keys.view(-1, *keys.shape[2:]).index_copy_(0, slots, k.to(keys.dtype))
        values.view(-1, *values.shape[2:]).index_copy_(0, slots, v.to(values.dtype))

    def gather(self, layer: int, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return K and V of `block_ids` [n]: [n * block_size, kv_heads, dim] each, copied out, in the cache's dtype."""
        keys, values = self.keys[layer], self.values[layer]
        k = keys.view(len(keys), -1).index_select(0, block_ids)
        v = values.view(len(values), -1).index_select(0, block_ids)
        return k.view(-1, *keys.shape[2:]), v.view(-1, *values.shape[2:])


def check_call(
    backend: str, honours: frozenset[str], spec: KVSpec, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
) -> None:
    """Raise UnsupportedAttention, naming layer and argument, if this call cannot be answered exactly."""
    unknown = args.non_default() - honours
    if unknown:
        raise UnsupportedAttention(
            f"Attention backend {backend!r} does not honour {', '.join(sorted(unknown))}, which layer {spec.name} asks "
            f"for; it honours {', '.join(sorted(honours)) or 'nothing beyond plain causal attention'}."
        )
    if spec.reach.is_bounded and spec.reach != Reach(args.window, args.chunk):
        raise UnsupportedAttention(
            f"Layer {spec.name} keeps K and V for {spec.reach}, but attends with window {args.window} and chunk "
            f"{args.chunk}."
        )
    wanted = ((spec.num_kv_heads, spec.k_dim), (spec.num_kv_heads, spec.v_dim))
    found = (tuple(k.shape[1:]), tuple(v.shape[1:]))
    if found != wanted:
        raise UnsupportedAttention(
            f"Layer {spec.name} keeps K and V of [heads, width] {wanted}, but was given {found}."
        )
    if q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        raise UnsupportedAttention(
            f"Layer {spec.name} attends with {q.shape[1]} query heads of width {q.shape[-1]} over {k.shape[1]} K/V "
            f"heads of width {k.shape[-1]}; the widths must agree and the heads divide."
        )


def visible(q_positions: Tensor, k_positions: Tensor, args: AttentionArgs) -> Tensor:
    """Return a bool mask: True where the query at `q_positions` [..., q, 1] sees the key at `k_positions` [..., k]."""
    seen = k_positions <= q_positions
    if args.window is not None:
        seen = seen & (k_positions > q_positions - args.window)
    if args.chunk is not None:
        seen = seen & (k_positions // args.chunk == q_positions // args.chunk)
    return seen


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, distance: Tensor, args: AttentionArgs) -> Tensor:
    """Attend by the plain formula, in float32, with grouped heads, softcap, sinks and position bias.

    q [batch, kv_heads, group, q, k_dim], k [batch, kv_heads, k, k_dim], v [batch, kv_heads, k, v_dim],
    mask and distance (query position - key position) broadcast to [batch, kv_heads, group, q, k]
    -> [batch, kv_heads, group, q, v_dim].
    Softcap: Gemma 2 (2024). Sinks: Xiao et al. 2023, as a logit without a value. Bias: Press et al. 2021 (ALiBi),
    Raffel et al. 2019 (T5).
    """
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2).unsqueeze(2)) * args.scaling
    if args.softcap is not None:
        scores = args.softcap * torch.tanh(scores / args.softcap)
    heads = (1, q.shape[1], q.shape[2], 1, 1)
    if args.bias is not None:
        scores = scores + position_bias(args.bias, distance, q.shape[1])
    scores = scores.masked_fill(~mask, -torch.inf)
    if args.sinks is None:
        weights = scores.softmax(-1)
    else:
        sinks = args.sinks.float().view(heads).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return torch.matmul(weights, v.float().unsqueeze(2)).to(q.dtype)


def position_bias(bias: Tensor, distance: Tensor, kv_heads: int) -> Tensor:
    """Return what `AttentionArgs.bias` adds at each distance [..., q, k] (at most five dimensions, heads of size 1).

    -> [batch, kv_heads, group, q, k], or what broadcasts to it. Distances below 0 are masked: any number will do.
    """
    if bias.dim() == 1:
        return -bias.float().view(1, kv_heads, -1, 1, 1) * distance
    last = bias.shape[1] - 1
    rows = distance.clamp(0, last).view((1,) * (5 - distance.dim()) + tuple(distance.shape))[:, 0, 0]  # [batch, q, k]
    found: Tensor = bias.float()[:, rows].transpose(0, 1).unflatten(1, (kv_heads, -1))
    return found
