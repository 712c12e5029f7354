"""Engines with a screened head: the same tokens, and only where nobody asks for more than the highest logit."""

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
    return LLM(model=str(folder), skip_tokenizer_init=True, max_num_batched_tokens=32, **options)


def tokens_of(llm, params=GREEDY):
    llm.reset_prefix_cache()
    return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, params)]


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "qwen3_moe", "gpt2"])
def model(request, tmp_path_factory):
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param), vocab_size=3000)


@pytest.mark.parametrize("impl", ["auto", "transformers"])
def test_greedy_requests_get_the_tokens_of_all_logits(model, impl, found):
    with opened(model, model_impl=impl, enable_head_screen=False) as llm:
        wanted = tokens_of(llm)
    assert not found
    with opened(model, model_impl=impl) as llm:
        assert tokens_of(llm) == wanted
    assert found and max(found) == len(PROMPTS)


@pytest.mark.parametrize("impl", ["auto", "transformers"])
def test_guessed_tokens_are_verified_by_what_is_highest(model, impl, found):
    with opened(model, model_impl=impl, enable_head_screen=False) as llm:
        wanted = tokens_of(llm)
    with opened(model, model_impl=impl, speculative_ngram=2, speculative_ngram_min=1) as llm:
        assert tokens_of(llm) == wanted
    assert found


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 1.0, "seed": 3},
        {"logprobs": 2},
        {"prompt_logprobs": 1},
        {"logit_bias": {7: 1.0}},
        {"allowed_token_ids": [5, 6, 7]},
        {"min_tokens": 3},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.2},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_who_asks_for_more_than_the_highest_logit_has_all_of_them(asked, found, tmp_path):
    params = GREEDY.with_changes(max_tokens=4, **asked)
    with opened(tiny_checkpoint("llama", tmp_path, vocab_size=3000)) as llm:
        tokens_of(llm, params)
    assert not found


def test_beside_a_request_that_asks_for_logprobs_nobody_is_screened(found, tmp_path):
    params = [GREEDY, GREEDY.with_changes(logprobs=1), GREEDY]
    with opened(tiny_checkpoint("llama", tmp_path, vocab_size=3000), max_mixed_prefill_tokens=32) as llm:
        llm.generate(PROMPTS, params)
    assert max(found, default=0) <= 2


def test_a_head_that_somebody_looks_at_computes_all_logits(found, tmp_path):
    with opened(tiny_checkpoint("llama", tmp_path, vocab_size=3000)) as llm:
        handle = llm._engine.model.head.register_forward_hook(lambda *_: None)
        wanted = tokens_of(llm)
        assert not found
        handle.remove()
        assert tokens_of(llm) == wanted
    assert found


# ------------------------------------------------------------------------------------------------ the fallback


@pytest.mark.parametrize("model_type", ["gemma2", "cohere", "granite"])  # a cap, a factor, a divisor
def test_logits_that_are_changed_after_the_head_are_all_computed(model_type, found, tmp_path):
    folder = tiny_checkpoint(model_type, tmp_path, vocab_size=3000)
    with opened(folder, model_impl="transformers", enable_head_screen=False) as llm:
        wanted = tokens_of(llm)
    with opened(folder, model_impl="transformers") as llm:
        assert tokens_of(llm) == wanted
    assert not found


def test_a_module_that_begins_to_change_its_logits_is_run_again_with_all_of_them(found, tmp_path):
    folder = tiny_checkpoint("llama", tmp_path, vocab_size=3000)
    with opened(folder, model_impl="transformers") as llm:
        before = tokens_of(llm)
        count = len(found)
        assert count
        change(llm)
        changed = tokens_of(llm)
        assert len(found) == count + 1 and changed != before
    with opened(folder, model_impl="transformers", enable_head_screen=False) as llm:
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
    with opened(tiny_checkpoint("llama", tmp_path, vocab_size=3000), model_impl="transformers") as llm:
        first = llm._engine.model.module.model.layers._modules["0"].forward
        assert isinstance(first, FirstLayer) and first.shared.head is not None
        first.shared.head.was_used = False
        tokens_of(llm)
        assert first.shared.head.was_used
    assert found
