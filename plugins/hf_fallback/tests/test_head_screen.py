"""A module's head is screened where it has the last word, and only there."""

import pytest

from core import LLM, SamplingParams
from core.testing import tiny_checkpoint
from core_hf_fallback.patches.layer_stack import FirstLayer

pytest.importorskip("core_cpu_kernels", reason="not installed where there is no C++ compiler")
from core_cpu_kernels import screen

PROMPTS = [{"prompt_token_ids": ids} for ids in ([5], list(range(7, 26)), list(range(5, 85)))]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(autouse=True)
def small_weights_are_worth_it(monkeypatch):
    monkeypatch.setattr(screen, "LEAST_NUMBERS", 0)


@pytest.fixture
def found(monkeypatch):
    """The rows of every call of a screen."""
    rows, call = [], screen.ScreenKernel.__call__

    def counted(kernel, x):
        rows.append(x.numel() // x.shape[-1])
        return call(kernel, x)

    monkeypatch.setattr(screen.ScreenKernel, "__call__", counted)
    return rows


def opened(folder, **options):
    return LLM(
        model=str(folder), skip_tokenizer_init=True, model_impl="transformers", max_num_batched_tokens=32, **options
    )


def tokens_of(llm):
    llm.reset_prefix_cache()
    return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("model_type", ["gemma2", "cohere", "granite"])  # a cap, a factor, a divisor
def test_logits_that_are_changed_after_the_head_are_all_computed(model_type, found, tmp_path):
    folder = tiny_checkpoint(model_type, tmp_path, vocab_size=3000)
    with opened(folder, enable_head_screen=False) as llm:
        wanted = tokens_of(llm)
    with opened(folder) as llm:
        assert tokens_of(llm) == wanted
    assert not found


def test_a_module_that_begins_to_change_its_logits_is_run_again_with_all_of_them(found, tmp_path):
    folder = tiny_checkpoint("llama", tmp_path, vocab_size=3000)
    with opened(folder) as llm:
        before = tokens_of(llm)
        count = len(found)
        assert count
        change(llm)
        changed = tokens_of(llm)
        assert len(found) == count + 1 and changed != before
    with opened(folder, enable_head_screen=False) as llm:
        change(llm)
        assert tokens_of(llm) == changed


def change(llm):
    module = llm._engine.model.module
    plain = module.forward

    def negative(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = -out.logits
        return out

    module.forward = negative


def test_layers_in_one_call_still_learn_that_the_head_takes_no_others(found, tmp_path):
    with opened(tiny_checkpoint("llama", tmp_path, vocab_size=3000)) as llm:
        first = llm._engine.model.module.model.layers._modules["0"].forward
        assert isinstance(first, FirstLayer) and first.shared.head is not None
        first.shared.head.was_used = False
        tokens_of(llm)
        assert first.shared.head.was_used
    assert found
