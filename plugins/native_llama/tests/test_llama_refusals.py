"""What the native implementation does not honour it names: configs by a refusal, tensors by an error."""

import json
from pathlib import Path

import pytest

from core import LLM
from core.contracts import Bid, Refusal
from core.errors import CheckpointError, NoImplementation
from core.spec import ModelSpec
from core.testing import tiny_checkpoint
from core_native_llama.bid import bid_for

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}


def answer(**changes):
    return bid_for(ModelSpec(Path("tiny"), "hf", {**LLAMA, **changes}))


def test_the_plain_config_is_bid_for():
    bid = answer()
    assert isinstance(bid, Bid)
    assert (bid.name, bid.priority, bid.is_fallback) == ("native_llama", 100, False)


def test_another_family_is_passed_over():
    assert answer(model_type="gpt2") is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope type 'spiral'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"pretraining_tp": 2}, "pretraining_tp 2"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"auto_map": {"AutoModelForCausalLM": "mine.Mine"}}, "auto_map"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"is_causal": False}, "is_causal"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 4, "layer_types": ["linear"] * 2},
            "layer_types",
        ),
    ],
)
def test_a_config_it_would_guess_at_is_refused_by_name(changes, named):
    refusal = answer(**changes)
    assert isinstance(refusal, Refusal)
    assert named in refusal.reason


def test_a_refused_config_is_an_error_for_model_impl_native_and_says_why(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "hidden_act": "gelu"}))
    with pytest.raises(NoImplementation, match="hidden_act 'gelu'"):
        LLM(model=str(tmp_path), model_impl="native", skip_tokenizer_init=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from safetensors.torch import load_file

    folder = tiny_checkpoint("llama", tmp_path_factory.mktemp("tensors"))
    return folder, load_file(folder / "model.safetensors")


def load_with(saved, tmp_path, change):
    from safetensors.torch import save_file

    folder, tensors = saved
    changed = dict(tensors)
    change(changed)
    save_file(changed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    LLM(model=str(tmp_path), model_impl="native", skip_tokenizer_init=True).close()


def test_a_missing_tensor_is_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"Missing tensors \(1\): model.layers.1.self_attn.k_proj.weight"):
        load_with(saved, tmp_path, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))


def test_a_left_over_tensor_is_named(saved, tmp_path):
    def add(tensors):
        tensors["model.layers.9.mlp.gate_proj.weight"] = tensors["model.layers.1.mlp.gate_proj.weight"].clone()

    with pytest.raises(CheckpointError, match=r"Left over \(1\): model.layers.9.mlp.gate_proj.weight"):
        load_with(saved, tmp_path, add)


def test_a_misshapen_tensor_is_named_with_both_shapes(saved, tmp_path):
    def shorten(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:7].clone()

    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.up_proj.weight.*\[7, 32\].*\[48, 32\]"):
        load_with(saved, tmp_path, shorten)


def test_an_old_checkpoints_rotary_buffers_are_fine(saved, tmp_path):
    import torch

    load_with(saved, tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
