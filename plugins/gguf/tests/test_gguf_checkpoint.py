"""A model that was converted to GGUF comes back under transformers' names, with its own weights, config and logits."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from core.contracts import Checkpoint
from core.errors import CheckpointError
from core_gguf.checkpoint import GGUFCheckpoint

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}


def _gguf_name(arch, name):
    if not name.startswith("model.layers."):
        return (TOP | {"lm_head.weight": "output.weight"})[name]
    _, _, layer, *part, kind = name.split(".")
    return f"blk.{layer}.{(GEMMA_NAMES if arch == 'gemma3' else NAMES)['.'.join(part)]}.{kind}"


def _as_llama_cpp_converts(arch, name, value):
    """The formula of llama.cpp's convert_hf_to_gguf.py."""
    if arch == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = 4 if "q_proj" in name else 2
        return value.reshape(heads, 2, len(value) // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    return value + 1 if arch == "gemma3" and name.endswith("norm.weight") else value


def _random_model(arch, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(MODEL_TYPES[arch], **(SHAPE | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms and biases too, which start as ones and zeros
        parameter.data = torch.randint(-64, 64, parameter.shape) / 64
    return model


def _write(write_gguf, metadata_of, arch, model, **extra):
    tied = model.config.tie_word_embeddings
    tensors = {
        _gguf_name(arch, name): _as_llama_cpp_converts(arch, name, value.numpy())
        for name, value in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0}
    metadata = (
        metadata_of(arch, 7) | {f"{arch}.attention.key_length": 8, f"{arch}.attention.value_length": 8} | ids | extra
    )
    return write_gguf(metadata, tensors, arch=arch)


def _serve(checkpoint):
    config = dict(checkpoint.spec.config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    weights = dict(checkpoint.tensors())
    if config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize(
    ("arch", "changes", "extra"),
    [
        ("llama", {"rms_norm_eps": 1e-5}, {}),
        ("llama", {"rms_norm_eps": 1e-5, "attention_bias": True, "mlp_bias": True}, {}),
        ("llama", {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}, {}),
        ("qwen2", {"rms_norm_eps": 1e-5}, {}),
        ("qwen3", {"rms_norm_eps": 1e-5}, {}),
        (
            "gemma3",
            {
                "rms_norm_eps": 1e-5,
                "sliding_window": 4,
                "query_pre_attn_scalar": 8,
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
            {"gemma3.attention.sliding_window": 4, "gemma3.rope.freq_base": 1e6},
        ),
    ],
    ids=["llama", "llama-biases", "llama-tied", "qwen2", "qwen3", "gemma3"],
)
def test_a_converted_model_has_its_own_weights_and_logits_again(write_gguf, metadata_of, arch, changes, extra):
    model = _random_model(arch, **changes)
    checkpoint = GGUFCheckpoint.open(_write(write_gguf, metadata_of, arch, model, **extra))
    served = _serve(checkpoint)
    assert type(served).__name__ == checkpoint.spec.architecture
    for name, value in model.state_dict().items():
        assert torch.equal(served.state_dict()[name], value), name
    ids = torch.arange(3, 19)[None]
    assert torch.equal(served(ids).logits, model(ids).logits)


def test_a_gguf_checkpoint_is_a_checkpoint(write_gguf, tiny):
    checkpoint = GGUFCheckpoint.open(write_gguf(*tiny))
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.tensor_names() == ("model.embed_tokens.weight", "model.norm.weight")
    assert [name for name, _ in checkpoint.tensors()] == list(checkpoint.tensor_names())


def test_a_tensor_with_no_place_in_the_model_is_refused_by_name(write_gguf, tiny):
    for name in ("blk.0.attn_sinks.weight", "blk.2.attn_norm.weight", "surplus"):
        path = write_gguf(tiny[0], tiny[1] | {name: np.ones(32, np.float32)})
        with pytest.raises(CheckpointError, match=f"tensor '{name}' has no place"):
            GGUFCheckpoint.open(path)


def test_a_type_that_cannot_be_decoded_is_named_before_the_first_tensor(write_gguf, tiny):
    raw = np.zeros((64, 50), np.uint8)
    bad = (raw, gguf.GGMLQuantizationType.IQ1_S)
    embedding = {"token_embd.weight": np.zeros((40, 256), np.float32)}
    changed = tiny[0] | {"llama.embedding_length": 256}
    checkpoint = GGUFCheckpoint.open(write_gguf(changed, embedding | {"blk.0.ffn_up.weight": bad}))
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_up\.weight' is of type IQ1_S"):
        next(checkpoint.tensors())
    assert checkpoint.raw("model.layers.0.mlp.up_proj.weight").type.name == "IQ1_S"


def test_raw_blocks_decode_to_the_same_tensor(smollm2_path):
    checkpoint = GGUFCheckpoint.open(smollm2_path)
    for name in ("model.layers.3.self_attn.k_proj.weight", "model.layers.3.mlp.down_proj.weight", "model.norm.weight"):
        raw = checkpoint.raw(name)
        decoded = gguf.quants.dequantize(raw.data.numpy(), gguf.GGMLQuantizationType(raw.type.id)) - raw.minus
        assert np.array_equal(decoded.reshape(raw.shape), checkpoint.tensor(name).numpy())


def test_an_unknown_name_is_refused(write_gguf, tiny):
    with pytest.raises(CheckpointError, match=r"no tensor for 'lm_head\.weight'"):
        GGUFCheckpoint.open(write_gguf(*tiny)).tensor("lm_head.weight")


def test_smollm2_opens_with_the_names_that_transformers_expects(smollm2_path):
    checkpoint = GGUFCheckpoint.open(smollm2_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**dict(checkpoint.spec.config)))
    expected = {name: value.shape for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert {name: checkpoint.raw(name).shape for name in checkpoint.tensor_names()} == expected
    assert checkpoint.spec.eos_token_ids == (2,)
    assert checkpoint.spec.max_positions == 8192
