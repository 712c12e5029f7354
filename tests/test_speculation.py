"""Guessing tokens by lookup: what is proposed, to whom, what counts of it, and who refuses it."""

import pytest

from core import LLM, SamplingParams
from core.config import EngineConfig
from core.contracts import StepStats
from core.errors import ConfigError
from core.metrics import Metrics
from core.request import Request
from core.speculation import Drafter, LookupLimits, NgramIndex, accepted_run
from core.testing import tiny_checkpoint


def continuation(text, count=3, longest=3, shortest=1):
    index = NgramIndex(LookupLimits(longest, shortest, count))
    index.extend(text)
    return index.continuation(count)


def test_what_followed_the_same_tokens_before_is_proposed():
    assert continuation([1, 2, 3, 4, 5, 9, 1, 2]) == [3, 4, 5]


def test_the_longest_ngram_decides_and_of_equal_ones_the_last():
    assert continuation([1, 2, 3, 7, 2, 3, 8, 1, 2, 3], count=1) == [7]
    assert continuation([2, 3, 7, 2, 3, 8, 2, 3], count=1) == [8]


def test_a_text_without_a_repeat_proposes_nothing():
    assert continuation([1, 2, 3, 4]) == []
    assert continuation([1, 2, 3, 1], shortest=2) == []
    assert continuation([]) == continuation([5]) == []


def test_a_proposal_that_reaches_the_end_of_the_text_goes_on_in_itself():
    assert continuation([1, 2, 1, 2], count=5) == [1, 2, 1, 2, 1]
    assert continuation([4, 4], count=4) == [4, 4, 4, 4]


def test_a_text_that_grows_is_looked_up_as_one_given_whole():
    text = [1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2, 3, 3, 1]
    index = NgramIndex(LookupLimits(3, 1, 4))
    for end, token in enumerate(text, 1):
        index.extend([token])
        assert index.continuation(4) == continuation(text[:end], 4)


def test_drafts_leave_room_for_the_token_that_the_step_gives_anyway():
    drafter = Drafter(LookupLimits(2, 1, 8))
    request = Request("a", [1, 2, 1, 2], SamplingParams(), max_tokens=4)
    assert len(drafter.propose(request, 100)) == 3
    assert len(drafter.propose(request, 2)) == 2
    request.output_ids += [1, 2, 1]
    assert drafter.propose(request, 100) == ()


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"bad_words": ["no"]},
        {"min_tokens": 3},
        {"prompt_logprobs": 1},
    ],
)
def test_nobody_guesses_for_a_request_whose_logits_depend_on_the_tokens_just_before(asked):
    request = Request("a", [1, 2, 1, 2], SamplingParams(**asked), max_tokens=9)
    assert Drafter(LookupLimits(2, 1, 4)).propose(request, 100) == ()


def test_min_tokens_that_are_reached_allow_guesses_again():
    request = Request("a", [1, 2, 1, 2], SamplingParams(min_tokens=2), max_tokens=9, output_ids=[1, 2])
    assert Drafter(LookupLimits(2, 1, 4)).propose(request, 100) == (1, 2, 1, 2)


@pytest.mark.parametrize(
    ("tokens", "kept"), [([5, 6, 7, 8], [5, 6, 7, 8]), ([5, 6, 1, 8], [5, 6, 1]), ([1, 6, 7, 8], [1])]
)
def test_a_run_ends_with_the_first_token_that_is_not_its_draft(tokens, kept):
    assert accepted_run([5, 6, 7], tokens, tokens) == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative_ngram": -1}, r"speculative_ngram must be 0 \(off\) or a positive integer, got -1"),
        ({"speculative_ngram": 1}, "speculative_ngram 1 is shorter than speculative_ngram_min 2"),
        ({"speculative_num_draft_tokens": 0}, "speculative_num_draft_tokens must be a positive integer"),
    ],
)
def test_options_that_cannot_be_right_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("model_type", "model_impl", "changes", "reason"),
    [
        ("mamba", "auto", {}, "transformers/rows cannot take back"),
        ("llama", "transformers/cache", {}, "transformers/cache cannot take back"),
        ("llama", "native", {"rope_parameters": DYNAMIC}, "native_llama .*depends on the length of the text"),
    ],
)
def test_a_model_that_cannot_take_a_token_back_is_refused_by_name(tmp_path, model_type, model_impl, changes, reason):
    folder = tiny_checkpoint(model_type, tmp_path, **changes)
    with pytest.raises(ConfigError, match=reason):
        LLM(str(folder), model_impl=model_impl, skip_tokenizer_init=True, device="cpu", speculative_ngram=3)


def test_metrics_count_guesses_and_show_the_share_that_was_right():
    metrics = Metrics()
    for drafted, accepted in ((0, 0), (5, 4), (3, 0)):
        metrics.observe(StepStats(1, 0, 1 + drafted, 0, 1 + accepted, 0, 9, 10, 0.1, drafted, accepted))
    text = metrics.render().decode()
    assert "core_serve_spec_decode_draft_tokens_total 8.0" in text
    assert "core_serve_spec_decode_accepted_tokens_total 4.0" in text
    assert "core_serve_spec_decode_acceptance_rate 0.5" in text
