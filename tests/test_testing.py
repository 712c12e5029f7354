"""The kit itself: its checkpoints are what they say, its comparison notices differences, its model needs no weights."""

import json

import pytest

from core import LLM, SamplingParams
from core.config import EngineConfig
from core.engine_build import build_engine
from core.errors import ConfigError
from core.plugins import PluginHost
from core.request import ClientRequest
from core.testing import (
    VOCAB,
    Answer,
    EchoPlugin,
    NoReference,
    _compare_one,
    assert_matches_transformers,
    default_prompts,
    tiny_checkpoint,
    transformers_answers,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


# ------------------------------------------------------------------------------------------------ checkpoints


def test_a_tiny_checkpoint_is_a_folder_of_its_model_type_and_small(llama):
    config = json.loads((llama / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == ("llama", VOCAB)
    assert (llama / "model.safetensors").stat().st_size < 1_000_000


def test_the_same_arguments_give_the_same_weights_and_leave_torchs_random_state_alone(llama, tmp_path):
    import torch

    torch.manual_seed(7)
    wanted = torch.rand(1)
    torch.manual_seed(7)
    again = tiny_checkpoint("llama", tmp_path)
    assert torch.equal(torch.rand(1), wanted)
    assert (again / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()


def test_every_weight_is_random_so_that_none_can_be_dropped_unnoticed(tmp_path):
    from safetensors.torch import load_file

    folder = tiny_checkpoint("qwen2", tmp_path)  # it has biases, which transformers starts at zero, and norms, at one
    tensors = load_file(folder / "model.safetensors")
    assert any(name.endswith("bias") for name in tensors)
    assert all(float(tensor.std()) > 0 for tensor in tensors.values())


def test_overrides_win_over_the_table(tmp_path):
    folder = tiny_checkpoint("mistral", tmp_path, num_hidden_layers=1, sliding_window=None)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["sliding_window"]) == (1, None)


@pytest.mark.parametrize("model_type", ["gpt_neo", "hunyuan_v1_dense", "granitemoehybrid", "deepseek_v3"])
def test_architectures_with_sizes_of_their_own_are_shrunk_too(model_type, tmp_path):
    folder = tiny_checkpoint(model_type, tmp_path)
    assert (folder / "model.safetensors").stat().st_size < 4_000_000


def test_an_architecture_that_stays_large_is_refused_before_it_takes_memory(tmp_path):
    with pytest.raises(ConfigError, match=r"'llama' has .* weights even when shrunk"):
        tiny_checkpoint("llama", tmp_path, vocab_size=1_000_000)


def test_of_a_composite_model_the_text_part_is_taken_where_its_class_takes_only_that(tmp_path):
    config = json.loads((tiny_checkpoint("llama4", tmp_path) / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama4_text", ["Llama4ForCausalLM"])


def test_the_few_layers_that_are_left_are_of_every_kind_that_the_model_has():
    from core.testing_configs import tiny_config

    assert set(tiny_config("gemma3_text").layer_types) == {"full_attention", "sliding_attention"}


def test_what_transformers_refuses_to_build_is_an_error_with_its_reason_and_a_way_on(tmp_path):
    with pytest.raises(ConfigError, match=r"small 'llama': .*hidden.*`overrides`"):
        tiny_checkpoint("llama", tmp_path, num_attention_heads=5)


def test_what_needs_a_package_that_is_missing_is_an_error_that_names_it(tmp_path, monkeypatch):
    from core import testing_checkpoints

    def without(model_type, **overrides):
        raise ImportError("TimmWrapperModel requires the timm library but it was not found. You can install it.")

    monkeypatch.setattr(testing_checkpoints, "tiny_config", without)
    with pytest.raises(ConfigError, match=r"cannot build .llama. without .*: TimmWrapperModel requires the timm"):
        tiny_checkpoint("llama", tmp_path)


def test_a_model_type_with_a_hyphen_is_as_good_as_any(tmp_path):
    folder = tiny_checkpoint("bert-generation", tmp_path)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert-generation"


def test_where_generate_itself_fails_there_is_no_reference_which_is_no_difference():
    with pytest.raises(NoReference, match="transformers' own generate fails: TypeError"):
        assert_matches_transformers("musicgen")


def test_an_unknown_model_type_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ConfigError, match="'llamma'"):
        tiny_checkpoint("llamma", tmp_path)


# ------------------------------------------------------------------------------------------------ comparison


def test_the_comparison_takes_a_folder_and_says_who_served(llama):
    assert assert_matches_transformers(llama, max_tokens=4) == "native_llama"
    assert assert_matches_transformers(llama, "transformers", max_tokens=4).startswith("transformers/")


def test_the_comparison_notices_another_model(llama, tmp_path):
    """The served weights are changed a little, beside the reference's."""
    from safetensors.torch import load_file, save_file

    wanted = transformers_answers(llama, default_prompts(), 4)
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.2.self_attn.o_proj.weight"] *= 1.2
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with LLM(model=str(tmp_path), skip_tokenizer_init=True) as llm, pytest.raises(AssertionError, match="native_llama"):
        from core.testing import _compare

        _compare(llm, default_prompts(), wanted, 2e-3, "a cold prefix cache")


def completion(token_ids, logprobs):
    from core.outputs import CompletionOutput, Logprob

    steps = [{token: Logprob(value)} for token, value in zip(token_ids, logprobs, strict=True)]
    return CompletionOutput(0, "", list(token_ids), steps, "length")


@pytest.mark.parametrize(
    ("token_ids", "logprobs", "complaint"),
    [
        ([1, 0], [-0.5, -0.5], "token 1 is 0, transformers says 2"),
        ([1, 2], [-0.5, -0.9], "the logprob of token 1"),
        ([1], [-0.5], "token 1 is None"),
        ([1, 2, 3], [-0.5, -0.5, -0.5], "goes on after"),
    ],
)
def test_each_kind_of_difference_is_named(token_ids, logprobs, complaint):
    import torch

    wanted = Answer([1, 2], torch.tensor([[-3.0, -0.5, -3.0, -3.0], [-3.0, -3.0, -0.5, -3.0]]))
    _compare_one(completion([1, 2], [-0.5, -0.5]), wanted, 2e-3, "here")
    with pytest.raises(AssertionError, match=complaint):
        _compare_one(completion(token_ids, logprobs), wanted, 2e-3, "here")


def test_a_near_tie_of_transformers_itself_ends_the_comparison():
    import torch

    wanted = Answer([1, 2], torch.tensor([[-0.6931, -0.6930, -9.0], [-9.0, -9.0, -0.1]]))
    _compare_one(completion([0, 0], [-0.6931, -5.0]), wanted, 2e-3, "here")


def test_two_default_prompts_share_a_beginning_and_one_is_longer_than_a_chunk():
    prompts = default_prompts()
    assert any(a != b and a[:11] == b[:11] for a in prompts for b in prompts if min(len(a), len(b)) >= 11)
    assert min(map(len, prompts)) == 1
    assert max(map(len, prompts)) > 3 * 7


# ------------------------------------------------------------------------------------------------ echo


def echo_engine(**options):
    options = {"model": "echo", "skip_tokenizer_init": True, "device": "cpu", **options}
    return build_engine(EngineConfig.from_options(**options), PluginHost.load(extra={"echo": EchoPlugin()}))


def run_all(engine):
    answers = {}
    while engine.has_work:
        for delta in engine.step():
            answers.setdefault(delta.request_id, []).extend(delta.token_ids)
    return answers


def test_the_echo_model_counts_on_from_the_last_token_and_wraps_around():
    engine = echo_engine()
    engine.add(ClientRequest("a", [5, 9], SamplingParams(max_tokens=3, temperature=0)))
    engine.add(ClientRequest("b", [VOCAB - 2], SamplingParams(max_tokens=3, temperature=0)))
    assert run_all(engine) == {"a": [10, 11, 12], "b": [VOCAB - 1, 0, 1]}
    assert sorted(engine.model.released) == ["a#0", "b#0"]


def test_the_echo_model_runs_under_preemption():
    engine = echo_engine(num_blocks=8, block_size=2)
    for start in (10, 30, 50):
        engine.add(ClientRequest(str(start), [start, start + 1], SamplingParams(max_tokens=9, temperature=0)))
    assert run_all(engine) == {str(start): list(range(start + 2, start + 11)) for start in (10, 30, 50)}
