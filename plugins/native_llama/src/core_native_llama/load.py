"""Checkpoint tensors into the model, one at a time: the peak is the model and its largest tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from core.contracts import Checkpoint, Model, Refusal
from core.layers import pack_linears, reads_on_device, screen_of, take_kernels
from core.layers.embedding import Head, make_room
from core.layers.linear import Linear, Loader, MergedLinear
from core.memory import letting_go
from core.model_loader import BuildContext
from core.quant_weights import by_transformers, says_nothing, weight_stream
from core.weights import load_strict
from core_native_llama.config import LlamaConfig
from core_native_llama.model import Layer, LlamaModel


def load(config: LlamaConfig, checkpoint: Checkpoint, context: BuildContext) -> Model | Refusal:
    """Build the model and fill it. Raises CheckpointError naming every missing or left-over tensor."""
    if context.quant_method is not None and by_transformers(context.quant_method):
        return Refusal(f"only transformers reads weights quantized with {context.quant_method.name!r}")
    with torch.device("meta" if context.quant_method else context.device):
        model = LlamaModel(config, context.dtype, context.device)
    if context.quant_method is not None:
        make_room(model, context.device)
    loaders = _loaders(model)
    tensors = weight_stream(checkpoint, context, linears=_linears(loaders))
    needed = (pair for pair in tensors if pair[0] in loaders or context.quant_method is None or not says_nothing(*pair))
    load_strict(loaders, needed, ignore=_ignored(config), checkpoint=checkpoint)
    if config.tied:
        model.head.tie(model.embedding)  # a quantized embedding took the place of the one that was tied
    kinds = (Linear, MergedLinear, Head)
    pack_linears(model, kinds, kernels=context.kernels, let_go=letting_go(checkpoint))
    if context.kernels is not None:
        take_kernels(model, context.kernels)
        model.join_layers(context.kernels)
        model.screen = screen_of(model.head, context.kernels) if context.options.enable_head_screen else None
    if not reads_on_device(model):
        model.features = replace(model.features, captures_decode=False)
    return model.eval()


def _linears(loaders: Mapping[str, Loader]) -> set[str]:
    """The weights that may be quantized on the fly."""
    return {name for name in loaders if name.endswith("_proj.weight")}


def _loaders(model: LlamaModel) -> dict[str, Loader]:
    """Return what takes each tensor, by its name in the checkpoint."""
    found = model.embedding.loaders("model.embed_tokens") | model.norm.loaders("model.norm")
    if not model.config.tied:
        found |= model.head.loaders("lm_head")
    for index, layer in enumerate(model.layers):
        found |= _layer_loaders(layer, f"model.layers.{index}")
    return found


def _layer_loaders(layer: Layer, name: str) -> dict[str, Loader]:
    attention = layer.attention
    found = attention.qkv.merged_loaders([f"{name}.self_attn.{part}_proj" for part in "qkv"])
    found |= attention.output.loaders(f"{name}.self_attn.o_proj")
    if attention.q_norm is not None and attention.k_norm is not None:
        found |= attention.q_norm.loaders(f"{name}.self_attn.q_norm")
        found |= attention.k_norm.loaders(f"{name}.self_attn.k_norm")
    found |= layer.attention_norm.loaders(f"{name}.input_layernorm")
    found |= layer.mlp_norm.loaders(f"{name}.post_attention_layernorm")
    return found | layer.mlp.loaders(f"{name}.mlp")


def _ignored(config: LlamaConfig) -> Callable[[str], bool]:
    """Buffers that old checkpoints carry, and a stored copy of the tied head."""

    def ignore(name: str) -> bool:
        return name.endswith(".rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight")

    return ignore
