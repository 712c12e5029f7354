"""GGUF tensor names -> transformers' names, and what llama.cpp's converter did to the values on the way."""

from __future__ import annotations

import re
from dataclasses import dataclass

from core.errors import CheckpointError
from core_gguf.model_config import architecture, head_counts
from core_gguf.reader import GGUFFile, TensorInfo
from core_gguf.rope import FACTORS_TENSOR

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_LAYER_OF = {
    "llama": _LAYER,
    "qwen2": _LAYER,
    "qwen3": _LAYER | _HEAD_NORMS,
    "gemma3": _LAYER
    | _HEAD_NORMS
    | {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
_IN_LAYER = re.compile(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True)
class TensorSource:
    """Where a tensor of transformers' name comes from, and how to undo the converter's changes."""

    name: str  # transformers' name
    info: TensorInfo
    rope_heads: int = 0  # > 0: rows were permuted for llama.cpp's rope, in so many heads
    minus: float = 0.0  # the converter added this to every number


def tensor_sources(file: GGUFFile) -> dict[str, TensorSource]:
    """Return every tensor of the file by transformers' name. Raises CheckpointError for a tensor with no place."""
    arch = architecture(file)
    heads, kv_heads = head_counts(file, arch)
    permuted = {"attn_q": heads, "attn_k": kv_heads} if arch == "llama" else {}
    sources: dict[str, TensorSource] = {}
    for info in file.tensors.values():
        if info.name == FACTORS_TENSOR:  # part of the config, see rope.py
            continue
        name, part = _translate(file, arch, info.name)
        minus = 1.0 if arch == "gemma3" and name.endswith("norm.weight") else 0.0
        sources[name] = TensorSource(name, info, _checked_heads(file, info, permuted.get(part, 0)), minus)
    return sources


def _translate(file: GGUFFile, arch: str, name: str) -> tuple[str, str]:
    """Return transformers' name and the part of a layer that it is ("" outside the layers)."""
    if name in _TOP:
        return _TOP[name], ""
    match = _IN_LAYER.fullmatch(name)
    layers = file.require(f"{arch}.block_count", int)
    if match is None or match[2] not in _LAYER_OF[arch] or int(match[1]) >= layers:
        raise CheckpointError(f"{file.path}: tensor {name!r} has no place in a {arch} model of {layers} layers.")
    return f"model.layers.{match[1]}.{_LAYER_OF[arch][match[2]]}.{match[3]}", match[2]


def _checked_heads(file: GGUFFile, info: TensorInfo, heads: int) -> int:
    if heads and info.shape[0] % (2 * heads):
        raise CheckpointError(
            f"{file.path}: tensor {info.name!r} of shape {info.shape} cannot be cut into {heads} heads."
        )
    return heads
