"""The attention of a native model: it hands Q, K and V to the step's backend, which owns the cache."""

from __future__ import annotations

from torch import Tensor

from core.batch import Batch
from core.contracts import AttentionArgs, KVSpec


class Attention:
    """One layer's place in the K/V cache and its arguments. Holds no weights."""

    def __init__(self, layer: int, spec: KVSpec, args: AttentionArgs) -> None:
        self.layer, self.spec, self.args = layer, spec, args

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """q [tokens, heads, k_dim], k and v [tokens, kv_heads, dim] -> [tokens, heads, v_dim]."""
        assert batch.attention is not None  # the host gives a backend to every model with kv_specs
        return batch.attention.attend(q, k, v, self.layer, self.args)
