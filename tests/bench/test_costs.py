"""What a model costs is read off its weights as they lie in memory."""

import json

import pytest

from core.bench.ceilings import Ceilings
from core.bench.costs import model_costs
from core.bench.offline import Step
from core.bench.roofline import decode_bound, decode_share, prefill_share
from core.testing import tiny_checkpoint

FLOAT = 4  # bytes


def costs_of(engine, folder):
    return model_costs(engine.model, json.loads((folder / "config.json").read_text()))


def llama_numbers(folder):
    """Return (numbers in the matrices of the layers, in the norms, in the head) of a Llama, by its config."""
    config = json.loads((folder / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    q, kv = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    matrices = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * inner
    return layers * matrices, (2 * layers + 1) * hidden, hidden * config["vocab_size"]


@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_a_llama_costs_what_its_config_says(make_engine, folder, impl):
    matrices, norms, head = llama_numbers(folder)
    costs = costs_of(make_engine(model_impl=impl), folder)
    assert costs.body_flops == 2 * matrices
    assert costs.head_flops == 2 * head
    assert costs.step_bytes(1) == costs.step_bytes(64) == FLOAT * (matrices + norms + head)


def test_k_and_v_cost_bytes_and_arithmetic_by_context(make_engine, folder):
    config = json.loads((folder / "config.json").read_text())
    costs = costs_of(make_engine(), folder)
    width = 2 * config["head_dim"] * config["num_hidden_layers"]
    assert costs.kv_bytes(100) == 100 * FLOAT * config["num_key_value_heads"] * width
    assert costs.pair_flops(100) == 100 * 2 * config["num_attention_heads"] * width


def test_a_head_that_shares_the_embeddings_weight_is_read_in_every_step(make_engine, tmp_path):
    folder = tiny_checkpoint("llama", tmp_path, tie_word_embeddings=True)
    matrices, norms, head = llama_numbers(folder)
    assert costs_of(make_engine(folder), folder).step_bytes(1) == FLOAT * (matrices + norms + head)


def test_quantized_weights_count_the_bytes_that_they_have(make_engine, folder):
    floats, quantized = costs_of(make_engine(), folder), costs_of(make_engine(quantization="int8"), folder)
    assert quantized.flops_per_token == floats.flops_per_token
    assert floats.body_bytes / 4 < quantized.body_bytes < floats.body_bytes / 2


def test_a_token_goes_through_its_share_of_the_experts(make_engine, tmp_path):
    folder = tiny_checkpoint("mixtral", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    costs = costs_of(make_engine(folder), folder)
    share = config["num_experts_per_tok"] / config["num_local_experts"]
    assert 0 < share < 1
    assert costs.expert_share == share
    assert costs.step_bytes(1) == pytest.approx(costs.body_bytes + costs.head_bytes + share * costs.expert_bytes)
    assert costs.step_bytes(1000) == pytest.approx(costs.body_bytes + costs.head_bytes + costs.expert_bytes)


def test_a_layer_with_a_window_reads_no_more_than_its_window(make_engine, tmp_path):
    folder = tiny_checkpoint("mistral", tmp_path, sliding_window=8)
    costs = costs_of(make_engine(folder), folder)
    assert costs.kv_bytes(4) < costs.kv_bytes(8) == costs.kv_bytes(200)


# ------------------------------------------------------------------------------------------------ roofline


def test_a_step_takes_the_longer_of_its_arithmetic_and_its_reading(make_engine, folder):
    costs = costs_of(make_engine(), folder)
    step = Step(seconds=1.0, tokens=2, prefill_tokens=0, sampled=2, contexts=(10, 20))
    read = costs.step_bytes(2) + costs.kv_bytes(30)
    computed = 2 * costs.flops_per_token + costs.pair_flops(30)
    slow_memory = Ceilings(gflops=1e9, dtype="float32", reads={"sum": 1.0}, threads=1)
    slow_arithmetic = Ceilings(gflops=1.0, dtype="float32", reads={"sum": 1e9}, threads=1)
    assert decode_bound(step, costs, slow_memory) == pytest.approx(read / 1e9)
    assert decode_bound(step, costs, slow_arithmetic) == pytest.approx(computed / 1e9)
    assert decode_share([step, step], costs, slow_memory) == pytest.approx(read / 1e9)


def test_steps_with_prompts_are_no_decode_and_have_a_bound_of_their_own(make_engine, folder):
    costs = costs_of(make_engine(), folder)
    machine = Ceilings(gflops=1.0, dtype="float32", reads={"sum": 1e9}, threads=1)
    step = Step(seconds=2.0, tokens=10, prefill_tokens=10, sampled=1, contexts=(10,))
    assert str(decode_share([step], costs, machine)) == "nan"
    flops = 10 * costs.body_flops + costs.head_flops + costs.pair_flops(1) * 55  # 1 + 2 + ... + 10 keys
    assert prefill_share([step], [10], costs, machine) == pytest.approx(flops / 1e9 / 2)
