"""LlamaConfig: config.json read with types, and refused by name where this implementation would guess. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.spec import ModelSpec

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
MODEL_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


class NotSupported(Exception):
    """The reason why this implementation declines a config."""


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and switches of one model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    max_positions: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: Mapping[str, Any]
    windows: tuple[int | None, ...]  # by layer

    @classmethod
    def from_spec(cls, spec: ModelSpec) -> LlamaConfig:
        """Read a config. Raises NotSupported with the reason."""
        config = spec.config
        _refuse_unknown(spec)
        heads = _integer(config, "num_attention_heads")
        layers = _integer(config, "num_hidden_layers")
        bias = bool(config.get("attention_bias", False))
        qwen2 = spec.model_type == "qwen2"
        return cls(
            hidden=_integer(config, "hidden_size"),
            inner=_integer(config, "intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocab=_integer(config, "vocab_size"),
            eps=float(config.get("rms_norm_eps", 1e-6)),
            max_positions=spec.max_positions or 2048,
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=bias or qwen2,
            output_bias=bias and not qwen2,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=spec.model_type == "qwen3",
            rope=_rope(config),
            windows=_windows(spec.model_type, config, layers),
        )


def _refuse_unknown(spec: ModelSpec) -> None:
    config = spec.config
    if spec.architecture not in (None, *MODEL_CLASSES):
        raise NotSupported(f"class {spec.architecture} is none of {', '.join(MODEL_CLASSES)}")
    if spec.auto_map.get("AutoModelForCausalLM"):
        raise NotSupported("the checkpoint brings its own Python class (auto_map), which may differ from the family's")
    if config.get("hidden_act", "silu") != "silu":
        raise NotSupported(f"hidden_act {config['hidden_act']!r} is not silu")
    if int(config.get("pretraining_tp") or 1) != 1:
        raise NotSupported(f"pretraining_tp {config['pretraining_tp']} is not 1")
    if config.get("is_causal", True) is False:
        raise NotSupported("is_causal is false: attention to the future is not supported")


def _integer(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise NotSupported(f"{name} is {value!r}, not a positive integer")
    return value


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Merge the newer `rope_parameters` with the older `rope_theta` and `rope_scaling`."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    found.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise NotSupported(f"rope type {kind!r} is none of {', '.join(ROPE_TYPES)}")
    if float(found.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)) != 1.0:
        raise NotSupported("partial_rotary_factor is not 1")
    return found


def _windows(model_type: str, config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Return each layer's sliding window, as transformers' config of that model type reads it."""
    window = config.get("sliding_window")
    if model_type == "mistral":
        return (window,) * layers
    if model_type == "llama" or not config.get("use_sliding_window", False) or not window:
        return (None,) * layers
    types = config.get("layer_types")
    if types is None:
        full = int(config.get("max_window_layers", 28))  # the first so many layers see everything
        types = ["sliding_attention" if layer >= full else "full_attention" for layer in range(layers)]
    if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise NotSupported(f"layer_types {types} is not one of full_attention or sliding_attention for each layer")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
