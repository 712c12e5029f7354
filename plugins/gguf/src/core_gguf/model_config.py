"""GGUF metadata -> the config.json that transformers would have. One function per architecture; no tensors are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from core.errors import CheckpointError
from core_gguf.reader import GGUFFile
from core_gguf.rope import rope_parameters

GEMMA3_PATTERN = 6  # every sixth layer sees everything, where the file does not say otherwise
GEMMA3_LOCAL_THETA = 10000.0  # rope base of the sliding layers
GEMMA3_27B_LAYERS = 62  # the one Gemma 3 whose attention scale is not that of its head size; no key says so
DTYPES = {"BF16": "bfloat16", "F16": "float16"}


def read_config(file: GGUFFile) -> dict[str, Any]:
    """Return the config dict. Raises CheckpointError for an architecture, or a feature of one, that is unknown."""
    arch = architecture(file)
    _refuse_unknown_features(file, arch)
    return _common(file, arch) | _ARCHITECTURES[arch](file)


def architecture(file: GGUFFile) -> str:
    """Return general.architecture if it is supported."""
    arch = file.require("general.architecture", str)
    if arch not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise CheckpointError(f"{file.path} holds a model of architecture {arch!r}. Supported from GGUF: {known}.")
    return arch


def special_ids(file: GGUFFile) -> dict[str, int]:
    """Return bos, eos and pad ids under transformers' names, those that the file has."""
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding", "unk_token_id": "unknown"}
    found = {name: file.get(f"tokenizer.ggml.{key}_token_id", int) for name, key in keys.items()}
    return {name: value for name, value in found.items() if value is not None}


def head_counts(file: GGUFFile, arch: str) -> tuple[int, int]:
    """Return the number of query heads and of K/V heads."""
    heads = _layer_constant(file, f"{arch}.attention.head_count")
    if f"{arch}.attention.head_count_kv" not in file.metadata:
        return heads, heads
    return heads, _layer_constant(file, f"{arch}.attention.head_count_kv")


def _refuse_unknown_features(file: GGUFFile, arch: str) -> None:
    if (experts := file.get(f"{arch}.expert_count", int, 0)) != 0:
        raise CheckpointError(f"{file.path} is a mixture of {experts} experts, which is not supported from GGUF.")
    if (parts := file.get("split.count", int, 0)) not in (0, 1):
        raise CheckpointError(
            f"{file.path} is one of {parts} parts. Join them with `llama-gguf-split --merge` and give the result."
        )


def _layer_constant(file: GGUFFile, key: str) -> int:
    """Read a number that may also be written once for each layer; layers that differ are not supported."""
    value = file.metadata.get(key)
    if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
        return int(value[0])
    if isinstance(value, np.ndarray):
        raise CheckpointError(f"{file.path}: {key!r} differs between layers ({value[:8]} ...), which is not supported.")
    return file.require(key, int)


def _head_dim(file: GGUFFile, arch: str) -> int:
    heads = head_counts(file, arch)[0]
    if heads < 1:
        raise CheckpointError(f"{file.path}: {arch}.attention.head_count is {heads}; at least 1 is needed.")
    dim = file.get(f"{arch}.attention.key_length", int, file.require(f"{arch}.embedding_length", int) // heads)
    values = file.get(f"{arch}.attention.value_length", int, dim)
    if dim is None or values != dim:
        raise CheckpointError(
            f"{file.path}: heads have {dim} dimensions in K but {values} in V, which is not supported."
        )
    return dim


def _vocab_size(file: GGUFFile) -> int:
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} lacks the tensor 'token_embd.weight'; it is not a language model.")
    return file.tensors["token_embd.weight"].shape[0]


def _dtype(file: GGUFFile) -> str:
    """Return the dtype to compute in: the matrices' own if they all are of one 16-bit type, else float32."""
    types = {info.type.name for info in file.tensors.values() if len(info.shape) > 1}
    return DTYPES.get(types.pop(), "float32") if len(types) == 1 else "float32"


def _has(file: GGUFFile, suffix: str) -> bool:
    return any(name.startswith("blk.") and name.endswith(suffix) for name in file.tensors)


def _common(file: GGUFFile, arch: str) -> dict[str, Any]:
    heads, kv_heads = head_counts(file, arch)
    return {
        "hidden_size": file.require(f"{arch}.embedding_length", int),
        "intermediate_size": _layer_constant(file, f"{arch}.feed_forward_length"),
        "num_hidden_layers": file.require(f"{arch}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": _head_dim(file, arch),
        "max_position_embeddings": file.require(f"{arch}.context_length", int),
        "rms_norm_eps": file.require(f"{arch}.attention.layer_norm_rms_epsilon", float),
        "vocab_size": _vocab_size(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_dropout": 0.0,
        "dtype": _dtype(file),
        "use_cache": True,
        **special_ids(file),
    }


def _attention_bias(file: GGUFFile) -> bool:
    """True if q, k, v and o all have a bias, as transformers' flag means; some of them only is an error."""
    found = {part: _has(file, f".attn_{part}.bias") for part in ("q", "k", "v", "output")}
    if any(found.values()) and not all(found.values()):
        biased = ", ".join(part for part, has in found.items() if has)
        raise CheckpointError(
            f"{file.path} has attention biases for {biased} only; all of q, k, v, output or none fit."
        )
    return all(found.values())


def _llama(file: GGUFFile) -> dict[str, Any]:
    """Llama and what is converted as llama: Mistral (recognised by its window), SmolLM, Yi ..."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rope_parameters": rope_parameters(file, "llama", _head_dim(file, "llama")),
        "attention_bias": _attention_bias(file),
        "mlp_bias": _has(file, ".ffn_down.bias"),
    }
    window = file.get("llama.attention.sliding_window", int)
    if not window:
        return config
    if config.pop("attention_bias") or config.pop("mlp_bias"):
        raise CheckpointError(f"{file.path} has a sliding window and biases; neither Llama nor Mistral has both.")
    return config | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}


def _qwen2(file: GGUFFile) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "rope_parameters": rope_parameters(file, "qwen2", _head_dim(file, "qwen2")),
        **_no_window(file, "qwen2"),
    }


def _qwen3(file: GGUFFile) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "rope_parameters": rope_parameters(file, "qwen3", _head_dim(file, "qwen3")),
        "attention_bias": _attention_bias(file),
        **_no_window(file, "qwen3"),
    }


def _no_window(file: GGUFFile, arch: str) -> dict[str, Any]:
    if (window := file.get(f"{arch}.attention.sliding_window", int, 0)) != 0:
        raise CheckpointError(
            f"{file.path} has a sliding window of {window} tokens, which {arch} files do not support."
        )
    return {
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * file.require(f"{arch}.block_count", int),
    }


def _gemma3(file: GGUFFile) -> dict[str, Any]:
    """The text part of Gemma 3. Its sliding layers have a rope of their own, which is never scaled."""
    head_dim = _head_dim(file, "gemma3")
    local = file.get("gemma3.rope.freq_base_swa", float, GEMMA3_LOCAL_THETA)
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": _gemma3_attention_scalar(file, head_dim),
        "sliding_window": file.require("gemma3.attention.sliding_window", int),
        "layer_types": _gemma3_layer_types(file),
        "rope_parameters": {
            "full_attention": rope_parameters(file, "gemma3", head_dim),
            "sliding_attention": {"rope_theta": local, "rope_type": "default"},
        },
        "attn_logit_softcapping": file.get("gemma3.attn_logit_softcapping", float),
        "final_logit_softcapping": file.get("gemma3.final_logit_softcapping", float),
        "use_bidirectional_attention": False,
    }


def _gemma3_attention_scalar(file: GGUFFile, head_dim: int) -> int:
    if file.require("gemma3.block_count", int) != GEMMA3_27B_LAYERS:
        return head_dim
    return file.require("gemma3.embedding_length", int) // head_counts(file, "gemma3")[0]


def _gemma3_layer_types(file: GGUFFile) -> list[str]:
    layers = file.require("gemma3.block_count", int)
    key = "gemma3.attention.sliding_window_pattern"
    pattern = file.metadata.get(key, GEMMA3_PATTERN)
    if isinstance(pattern, np.ndarray) and pattern.size == layers:  # True for a sliding layer
        slides = [bool(entry) for entry in pattern]
    elif isinstance(pattern, int) and pattern > 0:
        slides = [(layer + 1) % pattern != 0 for layer in range(layers)]
    else:
        raise CheckpointError(f"{file.path}: {key!r} is {pattern!r}; a period or one entry for each layer is needed.")
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


_ARCHITECTURES: dict[str, Callable[[GGUFFile], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
}
