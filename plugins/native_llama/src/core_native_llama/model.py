"""The decoder. Shapes: tokens [tokens], hidden states [tokens, hidden]; there is no batch dimension.

embed -> (norm, attention, +) (norm, mlp, +) for each layer -> norm -> head
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from core.batch import Batch
from core.contracts import AttentionArgs, KVSpec, ModelFeatures
from core.kernel_contracts import Kernels, LayerParts
from core.layers import (
    Attention,
    Embedding,
    GatedMLP,
    Head,
    LayerLinears,
    LayerNorms,
    LayerStack,
    Linear,
    MergedLinear,
    RMSNorm,
    Rotary,
    ScreenedHead,
    head_parts,
    layer_parts,
)
from core.reach import Reach
from core_native_llama.config import LlamaConfig

Rotation = tuple[Tensor, Tensor]  # cos, sin: [tokens, 1, head_dim]


class SelfAttention(nn.Module):
    """Merged Q, K, V; optional norms of Q and K by head (Qwen3); rotary; attention; output."""

    def __init__(self, config: LlamaConfig, layer: int, dtype: torch.dtype, device: str, rotary: Rotary) -> None:
        super().__init__()
        self.config, self.rotary = config, rotary
        self.q_size, self.kv_size = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.qkv = MergedLinear(config.hidden, [self.q_size, self.kv_size, self.kv_size], config.qkv_bias, dtype)
        self.output = Linear(self.q_size, config.hidden, config.output_bias, dtype)
        self.q_norm = RMSNorm(config.head_dim, config.eps, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.eps, dtype) if config.qk_norm else None
        spec = KVSpec(
            f"model.layers.{layer}.self_attn",
            config.kv_heads,
            config.head_dim,
            config.head_dim,
            dtype,
            device,
            Reach(config.windows[layer]),
        )
        args = AttentionArgs(scaling=config.head_dim**-0.5, window=config.windows[layer])
        self.attention = Attention(layer, spec, args)

    def forward(self, x: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        dim = self.config.head_dim
        q, k, v = self.qkv(x).split([self.q_size, self.kv_size, self.kv_size], -1)
        q, k, v = q.view(len(x), -1, dim), k.view(len(x), -1, dim), v.view(len(x), -1, dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotary.rotate(q, rotation), self.rotary.rotate(k, rotation)
        out: Tensor = self.output(self.attention(q, k, v, batch).reshape(len(x), -1))
        return out


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int, dtype: torch.dtype, device: str, rotary: Rotary) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.eps, dtype)
        self.attention = SelfAttention(config, layer, dtype, device, rotary)
        self.mlp_norm = RMSNorm(config.hidden, config.eps, dtype)
        self.mlp = GatedMLP(config.hidden, config.inner, config.mlp_bias, dtype)

    def parts(self) -> LayerParts | None:
        """Return the kernels of this layer; None if there is none for any part of it."""
        own = self.attention
        linears = LayerLinears(own.qkv, own.output, self.mlp.gate_up, self.mlp.down)
        norms = LayerNorms(self.attention_norm, self.mlp_norm, own.q_norm, own.k_norm)
        return layer_parts(norms, linears, self.mlp, own.rotary, own.attention, own.config.heads)

    def forward(self, x: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        """Add to x [tokens, hidden], in place, what attention and the feed-forward block make of it."""
        attended = self.attention(self.attention_norm(x), rotation, batch)
        return x.add_(self.mlp(self.mlp_norm.add(attended, x)))


class LlamaModel(nn.Module):
    """A `core.contracts.Model`."""

    impl_name = "native_llama"

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config, self.dtype, self.vocab_size = config, dtype, config.vocab
        self.embedding = Embedding(config.vocab, config.hidden, dtype)
        self.rotary = Rotary(config.head_dim, config.max_positions, config.rope, device)
        layers = range(config.layers)
        self.layers = nn.ModuleList(Layer(config, layer, dtype, str(device), self.rotary) for layer in layers)
        self.norm = RMSNorm(config.hidden, config.eps, dtype)
        self.stack: LayerStack | None = None
        self.screen: ScreenedHead | None = None
        self.head = Head(config.hidden, 0 if config.tied else config.vocab, False, dtype)
        if config.tied:
            self.head.tie(self.embedding)
        self.features = ModelFeatures(
            prefix_caching=not self.rotary.depends_on_length,
            captures_decode=not self.rotary.depends_on_length,
        )

    def kv_specs(self) -> Sequence[KVSpec]:
        return [layer.attention.attention.spec for layer in self.layers]

    def join_layers(self, kernels: Kernels) -> None:
        """Run all layers in one call from now on, where the kernels can; called when the linears are packed."""
        parts = [layer.parts() for layer in self.layers]  # type: ignore[operator]
        kernel = None if None in parts else kernels.decoder(parts, head_parts(self.norm, self.head))
        self.stack = None if kernel is None else LayerStack(kernel, list(self.layers), (self.norm, self.head))

    def forward(self, batch: Batch) -> Tensor:
        x = self.embedding(batch.token_ids)
        rotation = self.rotary(batch, self.dtype)
        everything = len(batch.logit_rows) == len(x)  # ascending, so all of them are x
        if self.stack is not None:
            whole = everything and self.stack.kernel.has_head and not self._screens(x, batch)
            filled = x.new_empty(len(x), self.vocab_size) if whole else None
            if self.stack.run(x, rotation, batch.attention, filled, None if everything else batch.logit_rows):
                return self._logits(x, batch, everything) if filled is None else filled
        for layer in self.layers:
            x = layer(x, rotation, batch)
        return self._logits(x, batch, everything)

    def _logits(self, x: Tensor, batch: Batch, everything: bool) -> Tensor:
        normed: Tensor = self.norm(x) if everything else self.norm.of_rows(x, batch.logit_rows)
        if self.screen is not None and self._screens(normed, batch):
            return self.screen.highest(normed)
        logits: Tensor = self.head(normed)
        return logits

    def _screens(self, x: Tensor, batch: Batch) -> bool:
        return batch.only_highest and self.screen is not None and self.screen.takes(x)

    def release(self, request_id: str) -> None:
        """All state is in the host's blocks."""
