"""Every member of the family gives transformers' tokens and logprobs, on tiny random checkpoints."""

import pytest

from core.testing import assert_matches_transformers, tiny_checkpoint

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MEMBERS = {
    "llama": ("llama", {}),
    "llama with a tied head": ("llama", {"tie_word_embeddings": True}),
    "llama with attention bias": ("llama", {"attention_bias": True}),
    "llama with mlp bias": ("llama", {"mlp_bias": True}),
    "llama with one K/V head": ("llama", {"num_key_value_heads": 1}),
    "llama with heads wider than hidden": ("llama", {"head_dim": 16}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    "llama, llama3 rope": (
        "llama",
        {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 5e5}},
    ),
    "llama, yarn rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e4,
            }
        },
    ),
    "mistral with a window": ("mistral", {"sliding_window": 6}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows in its upper layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen2 with a tied head": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3 with attention bias": ("qwen3", {"attention_bias": True}),
    "qwen3 with layer types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_a_member_answers_like_transformers(member):
    model_type, overrides = MEMBERS[member]
    assert assert_matches_transformers(model_type, "native", overrides=overrides, max_tokens=6) == "native_llama"


def test_a_dynamic_rope_goes_by_each_texts_own_length():
    # Prompts of 1 to 23 tokens run together; the longest is past the 16 positions that the config states.
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    overrides = {"max_position_embeddings": 16, "rope_parameters": rope}
    assert assert_matches_transformers("llama", "native", overrides=overrides) == "native_llama"


def test_a_window_changes_the_answer(tmp_path):
    """Without this, the comparison with a window would also hold for a model that ignores it."""
    with_window = answer_of(tiny_checkpoint("mistral", tmp_path / "with", sliding_window=6))
    assert with_window != answer_of(tiny_checkpoint("mistral", tmp_path / "without", sliding_window=None))


def answer_of(folder):
    from core import LLM, SamplingParams

    with LLM(model=str(folder), skip_tokenizer_init=True, num_blocks=8) as llm:
        return llm.generate([list(range(3, 30))], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids


def test_a_sharded_checkpoint_is_read_whole(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint("llama", tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "many", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert answer_of(tmp_path / "many") == answer_of(folder)


def test_few_blocks_and_preemption_give_the_same_tokens(tmp_path):
    from core import LLM, SamplingParams

    folder = tiny_checkpoint("qwen3", tmp_path)
    prompts = [list(range(3 + number, 15 + number)) for number in range(4)]
    params = SamplingParams(temperature=0, max_tokens=12)
    answers = []
    for num_blocks in (64, 12):  # 12 blocks of 4 tokens hold two whole texts of 24
        with LLM(model=str(folder), skip_tokenizer_init=True, block_size=4, num_blocks=num_blocks) as llm:
            llm._engine.take_stats()
            answers.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
            preempted = sum(getattr(one, "num_preempted", 0) for one in llm._engine.take_stats())
            assert (preempted > 0) == (num_blocks == 12)
    assert answers[0] == answers[1]
