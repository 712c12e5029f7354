"""Of a large model one layer of each kind is probed, and the others are served like it."""

import logging

import pytest
import torch
from torch import nn

from core import LLM
from core.testing import assert_matches_transformers, tiny_checkpoint
from core_hf_fallback import alike
from core_hf_fallback.alike import Alike, NotAlike, find_alike
from core_hf_fallback.interface import configs_of

FULL, SLIDING = "full_attention", "sliding_attention"
SHARED_KV = {"num_kv_shared_layers": 4, "layer_types": [SLIDING, FULL] * 4}  # later layers take K and V of earlier ones


@pytest.fixture
def all_are_large(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "core_serve.transformers")
    monkeypatch.setattr(alike, "LARGE", 0)


@pytest.mark.parametrize(
    ("model_type", "overrides", "probed"),
    [
        ("llama", {}, 1),
        ("gemma3_text", {"layer_types": [SLIDING, FULL] * 4}, 2),
        ("qwen3_moe", {"mlp_only_layers": [2]}, 2),  # one layer without experts
        ("deepseek_v3", {}, 2),
        ("gpt2", {}, 1),
    ],
)
def test_one_layer_of_each_kind_is_probed_and_all_answer_like_transformers(
    model_type, overrides, probed, all_are_large, caplog
):
    overrides = {"num_hidden_layers": 8, **overrides}
    served_by = assert_matches_transformers(model_type, "transformers", overrides=overrides, max_tokens=6)
    assert served_by == "transformers/paged"
    assert f"probed {probed} of 8 layers" in caplog.text


def test_the_layers_that_were_not_run_are_patched_like_those_that_were(all_are_large, tmp_path):
    folder = tiny_checkpoint("qwen3", tmp_path, num_hidden_layers=8)
    with LLM(model=str(folder), model_impl="transformers", skip_tokenizer_init=True) as llm:
        layers = llm._engine.runner.model.module.model.layers
        for part in ("", ".self_attn", ".mlp", ".input_layernorm"):
            forwards = [vars(layer.get_submodule(part[1:])).get("forward") for layer in layers]
            kinds = {type(forward) for forward in forwards[not part :]}  # the first layer of a stack runs them all
            assert len(kinds) == 1 and type(None) not in kinds, part


def test_layers_that_need_what_others_leave_are_all_probed(all_are_large, caplog):
    assert_matches_transformers("gemma4_text", "transformers", overrides={"num_hidden_layers": 8, **SHARED_KV})
    assert "probed" in caplog.text and "of 8 layers" not in caplog.text


class Layer(nn.Module):
    def __init__(self, number, scale=1.0):
        super().__init__()
        self.number, self.scale = number, scale
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.scale * self.linear(x)


class Stack(nn.Module):
    def __init__(self, scales):
        super().__init__()
        self.layers = nn.ModuleList(Layer(number, scale) for number, scale in enumerate(scales))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("scales", "like"),
    [
        ([1.0] * 6, (0,) * 6),
        ([1.0, 2.0] * 3, (0, 1) * 3),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], None),  # no two are alike
        ([1.0] * 4, None),  # so few that nothing is gained
    ],
)
def test_settings_tell_layers_apart_and_their_own_number_does_not(scales, like, all_are_large):
    found = find_alike(Stack(scales), [])
    assert (found and found.like) == like


def test_a_list_of_the_config_with_an_entry_a_layer_tells_them_apart(all_are_large, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint("olmo3", tmp_path, num_hidden_layers=6, layer_types=[SLIDING, FULL] * 3)
    module = AutoModelForCausalLM.from_pretrained(folder)
    assert find_alike(module, configs_of(module)).like == (0, 1) * 3


def test_a_layer_that_is_let_through_gives_what_it_was_given():
    stack, x = Stack([1.0] * 6), torch.randn(2, 4)
    with torch.no_grad(), Alike("layers", (0,) * 6).others_let_through(stack):
        assert torch.equal(stack(x), stack.layers[0](x))
    assert "forward" not in vars(stack.layers[1])


def test_a_layer_that_counts_in_whole_forwards_cannot_be_let_through():
    stack, made = Stack([1.0] * 6), []
    stack.layers[0].linear.register_forward_hook(lambda *_: made.append(1))
    with pytest.raises(NotAlike), Alike("layers", (0,) * 6).others_let_through(stack, lambda: len(made)):
        stack(torch.randn(2, 4))
