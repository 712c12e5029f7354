"""Windowed layers of real modules: long texts are served right while what lies behind the window is given back."""

import random

import pytest

from core import LLM, SamplingParams
from core.testing import assert_serves, tiny_checkpoint, transformers_answers

WINDOW, BLOCK = 8, 4


@pytest.mark.parametrize(
    ("model_type", "model_impl"), [("mistral", "native"), ("mistral", "transformers"), ("gemma3_text", "transformers")]
)
def test_long_texts_keep_no_more_than_their_windows(tmp_path, model_type, model_impl):
    folder = tiny_checkpoint(model_type, tmp_path)
    draw = random.Random(1)
    prompts = [[draw.randrange(3, 90) for _ in range(length)] for length in (90, 3, 61)]
    wanted = transformers_answers(folder, prompts, 20)
    options = {"block_size": BLOCK, "max_num_batched_tokens": 16, "max_num_seqs": 3, "max_model_len": 120}
    with LLM(str(folder), model_impl=model_impl, skip_tokenizer_init=True, device="cpu", **options) as llm:
        (window,) = llm._engine.scheduler.windows
        assert window.reach.window == WINDOW
        assert window.num_blocks < 30, "three texts of 110 tokens would take 83"
        assert_serves(llm, prompts, wanted, 2e-3)
        assert window.num_free == window.num_blocks


def test_a_prefix_longer_than_the_window_is_found_again(tmp_path):
    folder = tiny_checkpoint("gemma3_text", tmp_path)
    prompt = [random.Random(2).randrange(3, 90) for _ in range(64)]
    options = {"block_size": BLOCK, "max_num_batched_tokens": 16, "max_num_seqs": 3, "max_model_len": 120}
    with LLM(str(folder), model_impl="transformers", skip_tokenizer_init=True, device="cpu", **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        cold, warm = (llm.generate([{"prompt_token_ids": prompt}], params)[0] for _ in range(2))
        assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 60)
        assert cold.outputs[0].token_ids == warm.outputs[0].token_ids
