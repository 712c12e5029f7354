"""The config that a GGUF file stands for, and what is refused rather than guessed."""

from math import pi

import numpy as np
import pytest
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from core.errors import CheckpointError
from core_gguf.model_config import read_config
from core_gguf.reader import GGUFFile


@pytest.fixture
def config_of(write_gguf, tiny):
    def read(arch="llama", tensors=None, **changes):
        metadata = {key.replace("llama.", f"{arch}."): value for key, value in tiny[0].items()}
        metadata |= {key.replace("__", "."): value for key, value in changes.items()}
        metadata = {key: value for key, value in metadata.items() if value is not None}
        return read_config(GGUFFile.open(write_gguf(metadata, tiny[1] | (tensors or {}), arch=arch)))

    return read


def test_the_fields_come_under_transformers_names(config_of):
    config = config_of()
    assert config["model_type"] == "llama"
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert (config["hidden_size"], config["head_dim"], config["vocab_size"]) == (32, 8, 40)
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32"


def test_smollm2_s_config_is_the_one_its_folder_has(smollm2_path):
    config = AutoConfig.for_model(**read_config(GGUFFile.open(smollm2_path))).to_dict()
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "head_dim": 64,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "rms_norm_eps": 9.999999747378752e-06,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "unk_token_id": 0,
        "vocab_size": 49152,
    }
    assert {name: config[name] for name in expected} == expected


def test_matrices_of_one_16_bit_type_name_the_dtype(config_of):
    assert config_of(tensors={"token_embd.weight": np.ones((40, 32), np.float16)})["dtype"] == "float16"


def test_an_unknown_architecture_is_named_with_the_known_ones(write_gguf):
    file = GGUFFile.open(write_gguf({}, {}, arch="mamba"))
    with pytest.raises(
        CheckpointError, match=r"architecture 'mamba'\. Supported from GGUF: gemma3, llama, qwen2, qwen3"
    ):
        read_config(file)


def test_a_llama_with_a_window_is_a_mistral(config_of):
    config = config_of(llama__attention__sliding_window=16)
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 16)
    assert AutoConfig.for_model(**config).sliding_window == 16


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"llama__expert_count": 8}, "mixture of 8 experts"),
        ({"split__count": 3}, "one of 3 parts"),
        ({"llama__attention__value_length": 16}, "8 dimensions in K but 16 in V"),
        ({"llama__attention__head_count_kv": [2, 4]}, "differs between layers"),
        ({"llama__attention__head_count": 0}, "head_count is 0"),
        ({"llama__rope__dimension_count": 4}, "rotates 4 of 8 dimensions"),
        ({"llama__rope__scaling__type": "longrope"}, "rope scaling 'longrope'"),
        ({"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0}, "original_context_length"),
        ({"llama__block_count": None}, r"lacks the key 'llama\.block_count'"),
        ({"llama__block_count": "two"}, "'two', but int is needed"),
    ],
)
def test_what_is_not_understood_is_refused(config_of, changes, problem):
    with pytest.raises(CheckpointError, match=problem):
        config_of(**changes)


def test_some_attention_biases_only_are_refused(config_of):
    with pytest.raises(CheckpointError, match="biases for q only"):
        config_of(tensors={"blk.0.attn_q.bias": np.ones(32, np.float32)})


def test_a_file_without_embeddings_is_refused(write_gguf, tiny):
    with pytest.raises(CheckpointError, match="not a language model"):
        read_config(GGUFFile.open(write_gguf(tiny[0], {})))


def test_one_number_for_each_layer_is_fine_if_they_are_equal(config_of):
    assert config_of(llama__attention__head_count_kv=[2, 2])["num_key_value_heads"] == 2


def test_linear_and_yarn_scaling_become_rope_parameters(config_of):
    linear = config_of(llama__rope__scaling__type="linear", llama__rope__scaling__factor=8.0)
    assert linear["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 8.0}
    yarn = config_of(
        llama__rope__scaling__type="yarn",
        llama__rope__scaling__factor=4.0,
        llama__rope__scaling__original_context_length=32,
    )
    assert yarn["rope_parameters"] == {
        "rope_theta": 10000.0,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }


def _llama3_table(theta, head_dim, factor):
    """As llama.cpp's converter writes it."""
    table = []
    for pair in range(head_dim // 2):
        wavelength = 2 * pi * theta ** (2 * pair / head_dim)
        if wavelength < 8192 / 4:
            table.append(1.0)
        elif wavelength > 8192:
            table.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            table.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(table, np.float32)


def test_llama_3_s_scaling_is_recovered_from_its_table(config_of):
    table = _llama3_table(500000.0, 64, 32.0)
    changes = {
        "llama__rope__freq_base": 500000.0,
        "llama__attention__key_length": 64,
        "llama__attention__value_length": 64,
    }
    config = AutoConfig.for_model(**config_of(tensors={"rope_freqs.weight": table}, **changes))
    assert config.rope_parameters["factor"] == 32.0
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(frequencies.numpy(), plain / table, rtol=1e-5)


def test_rope_factors_that_are_not_llama_3_s_are_refused(config_of):
    with pytest.raises(CheckpointError, match="not those of llama 3"):
        config_of(tensors={"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)})


def test_gemma_3_slides_in_five_of_six_layers_with_a_rope_of_its_own(config_of):
    config = config_of(
        "gemma3", gemma3__block_count=7, gemma3__attention__sliding_window=16, gemma3__rope__freq_base=1e6
    )
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert config["rope_parameters"]["full_attention"]["rope_theta"] == 1e6
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 10000.0
    assert config["query_pre_attn_scalar"] == 8


def test_only_the_62_layer_gemma_3_scales_by_the_width_of_a_head(config_of):
    config = config_of(
        "gemma3",
        gemma3__block_count=62,
        gemma3__attention__sliding_window=16,
        gemma3__attention__key_length=16,
        gemma3__attention__value_length=16,
    )
    assert (config["head_dim"], config["query_pre_attn_scalar"]) == (16, 8)
