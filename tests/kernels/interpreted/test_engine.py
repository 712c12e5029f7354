"""The whole engine on the Triton backend gives the tokens that it gives on the CPU's."""

import os

import pytest

from core import LLM, SamplingParams
from core.testing import tiny_checkpoint

PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25]]


def tokens_of(folder, backend):
    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        attention_backend=backend,
        max_model_len=64,
        max_num_batched_tokens=12,  # prompts are cut into chunks, decoded beside each other
        block_size=4,
        kv_cache_memory=2**20,
    )
    assert llm.info.attention_name == (backend or os.environ["CORE_ATTENTION_BACKEND"])
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    llm.close()
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("model_type", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_the_engine_gives_the_same_tokens(model_type, tmp_path, monkeypatch):
    folder = tiny_checkpoint(model_type, tmp_path, num_hidden_layers=2)
    monkeypatch.setenv("CORE_ATTENTION_BACKEND", "triton")
    assert tokens_of(folder, None) == tokens_of(folder, "cpu")
