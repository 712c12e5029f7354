"""The config of a tiny model of any of transformers' causal architectures: general rules, then what single ones need.

Windows, chunks and the top-k of sparse attention are so small that they take effect within the 33 tokens of a
comparison. An architecture's own overrides are for sizes that have to fit each other; no rule here looks at outputs.
"""

from __future__ import annotations

from typing import Any

from core.errors import ConfigError

VOCAB = 96
TINY: dict[str, Any] = {  # what configs call their sizes -> a size that runs in milliseconds
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "max_seq_len": 256,
    "seq_length": 256,
    "context_length": 256,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "attention_hidden_size": 32,
    "lru_width": 32,
    "dim_model_base": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "n_inner": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "kv_channels": 8,
    "attention_head_dim": 16,
    "rotary_dim": 4,
    "sliding_window": 8,
    "attention_window_size": 8,
    "attention_chunk_size": 8,
    "window_size": 8,
    "local_attention": 8,
    "query_pre_attn_scalar": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 16,  # few heads often score exactly 0, and which of the tied tokens is attended is arbitrary
    "index_head_dim": 16,
    "index_topk": 8,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "state_size": 4,
    "ssm_state_size": 4,
    "time_step_rank": 4,
    "mamba_d_state": 4,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_dt_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "mamba_d_ssm": 64,
    "use_mamba_kernels": False,
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 8,
    "feed_forward_size": 48,
    "adapter_rank": 8,
    "is_decoder": True,
}
SPECIAL_TOKENS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": None}  # no token ends a text
FULL, SLIDING, LINEAR, INDEXED = "full_attention", "sliding_attention", "linear_attention", "indexed_attention"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TOWER: dict[str, Any] = {  # of encoders for images and sound, which never run here: only their size matters
    "hidden_size": 32,
    "embed_dim": 32,
    "d_model": 32,
    "hidden_dim": 32,
    "base_channels": 32,
    "output_channels": 32,
    "nemo_conv_channels": 16,
    "ext_pw_out_channel": 32,
    "depthwise_separable_out_channel": 32,
    "downsample_hidden_size": 32,
    "intermediate_size": 48,
    "mlp_dim": 48,
    "num_hidden_layers": 1,
    "num_blocks": 1,
    "encoder_layers": 1,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 2,
    "num_global_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "attention_heads": 2,
    "num_heads": 2,
    "image_size": 28,
    "crop_size": 28,
    "patch_size": 14,
    "vocab_size": VOCAB,
    "codebook_size": 16,
}
_QWEN4 = {
    "layer_types": [LINEAR, INDEXED] * 2,
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ple_embed_dim": 32,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
}
OWN_WAYS: dict[str, dict[str, Any]] = {  # sizes that no table of names can say, because they have to fit each other
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "cohere_compass_text": {
        "layer_types": [SLIDING, FULL] * 2,
        "rope_parameters": {SLIDING: ROPE, FULL: {**ROPE, "rope_theta": 50000.0}},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        # Both 32: the router of an older transformers takes as many features as the experts are wide.
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "layer_types": [SLIDING, FULL] * 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note_text": {
        "layer_types": [INDEXED, SLIDING] * 2,
        "head_dim": 16,
        "shared_experts_intermediate_size": 24,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "emu3_text_model": {"pad_token_id": 0},
    "gemma4_text": {"pad_token_id": 0},
    "gemma4_unified_text": {"pad_token_id": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", FULL] * 2},
    "lfm2_moe": {"layer_types": ["conv", FULL] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "moshi": {"sliding_window": 256},  # with one that takes effect, generate with and without cache differ
    "musicgen_decoder": {"num_codebooks": 1, "pad_token_id": 0},  # generate itself takes one row of ids a codebook
    "musicgen_melody_decoder": {"num_codebooks": 1, "pad_token_id": 0},
    "minimax_m3_vl_text": {
        "layer_types": [FULL, "minimax_m3_sparse"] * 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "index_local_blocks": 1,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "rotary_dim": 4,
    },
    "mixtral": {"sliding_window": 8},
    "modernbert-decoder": {"pad_token_id": 0},
    "phi3": {"sliding_window": 8},
    "phimoe": {"sliding_window": 8},
    "prophetnet": {"pad_token_id": 0},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3_moe": {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "pad_token_id": 0,
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "attn_layers": ["local", "lsh"] * 2,
        "num_buckets": 4,  # generate fails where it has to choose their number itself
        "hash_seed": 1,
    },
    "starcoder2": {"sliding_window": 8},
    "xlm": {"pad_token_id": 0, "mask_token_id": 5},  # generate appends the mask token; padding is blanked
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},  # its heads are rounded up to 64 in one place only
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": [LINEAR, "hybrid"] * 2,
        "attention_hidden_size": 64,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": [LINEAR, "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "num_key_value_heads": 4,
        "num_query_groups": 4,
        "mamba_headdim": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """Return transformers' config of a model type, shrunk, then changed by `overrides`.

    Where the causal class takes only the text part of a composite config, that part is returned.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"transformers knows no model type {model_type!r}; give one, or the folder of a checkpoint.")
    return _shrunk(_text_part(CONFIG_MAPPING[model_type](), model_class_of(model_type)), overrides)


def model_class_of(model_type: str) -> Any:
    """Return the class that transformers generates with. Raises ConfigError where there is none."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"transformers has no causal language model of type {model_type!r}; "
            "`core.supported_models.causal_models()` lists those that it has."
        )
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def _text_part(config: Any, model_class: Any) -> Any:
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None and type(part) is model_class.config_class:
            return part
    return config


def _shrunk(default: Any, overrides: dict[str, Any]) -> Any:
    """A text model's config, its parts shrunk too."""
    # The class's own names, not to_dict()'s: some store a size under another name than they take it.
    known = {**default.to_dict(), **getattr(default, "attribute_map", {})}
    sizes = {name: value for name, value in TINY.items() if known.get(name) is not None}
    for name in ("head_dim", "num_key_value_heads"):  # None where they follow from the other sizes, or have to be said
        if name in known:
            sizes[name] = TINY[name]
    if known.get("kv_lora_rank") is not None and "num_key_value_heads" in known:
        sizes["num_key_value_heads"] = TINY["num_attention_heads"]  # latent attention: K/V of every head are unpacked
    sizes |= {name: value for name, value in SPECIAL_TOKENS.items() if name in known}
    given = {**_in_its_words(default, OWN_WAYS.get(default.model_type, {})), **overrides}
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if part is not None and name not in ("attn_config", "ffn_config"):
            given[name] = _shrunk_part(part, given.get(name, {}))
    tiny = type(default)(**{**sizes, **given})
    missing = _missing_kinds(default, tiny)
    return tiny if not missing else type(default)(**{**sizes, **missing, **given})


def _in_its_words(default: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Entries of OWN_WAYS for an older transformers, whose hybrids call a layer with linear attention "mamba"."""
    translated: dict[str, Any] = {}
    for name in ("layer_types", "layers_block_type"):
        kinds = getattr(default, name, None) or ()
        if name in own and "mamba" in kinds and LINEAR not in kinds:
            translated[name] = ["mamba" if kind == LINEAR else kind for kind in own[name]]
    return {**own, **translated}


def _missing_kinds(default: Any, tiny: Any) -> dict[str, Any]:
    """The kinds of layers in turn, where the few that are left are all of one kind that happens to come first."""
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    here = getattr(tiny, "layer_types", None) or ()
    if set(kinds) <= set(here) or "layer_types" not in default.to_dict():
        return {}
    return {"layer_types": [kinds[at % len(kinds)] for at in range(len(here))]}


def _shrunk_part(default: Any, given: Any) -> Any:
    """A part of a composite config; `given` is the whole part, or entries of it."""
    if not isinstance(given, dict):
        return given
    return _shrunk(default, given) if _is_text(default) else _shrunk_tower(default, given)


def _is_text(part: Any) -> bool:
    """A part that a vocabulary and K/V or state make a language model; towers for images and sound have neither."""
    return getattr(part, "vocab_size", None) is not None and hasattr(part, "use_cache")


def _shrunk_tower(default: Any, given: dict[str, Any]) -> Any:
    known = default.to_dict()
    return type(default)(**{**{name: value for name, value in TOWER.items() if known.get(name) is not None}, **given})
