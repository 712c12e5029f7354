"""Broken logits and impossible requests fail alone, or are refused by name."""

from __future__ import annotations

import math

import pytest
from sampling import EOS, VOCAB, logits, request, sampler

from core.errors import InvalidParameter
from core.sampler import check_token_ids
from core.sampling_params import SamplingParams


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_p": 0.5}, {"logprobs": 2}], ids=str)
def test_a_row_of_broken_logits_fails_alone(broken, params):
    x = logits(3)
    whole = sampler().sample(x, [request(str(i), seed=i, **params) for i in range(3)])
    x[1] = broken
    found = sampler().sample(x, [request(str(i), seed=i, **params) for i in range(3)])
    assert found[1].token_id == -1 and found[1].logprobs is None and "NaN or infinite" in found[1].failed
    assert [found[0].token_id, found[2].token_id] == [whole[0].token_id, whole[2].token_id]


def test_a_single_nan_fails_its_row():
    x = logits()
    x[0, 17] = math.nan
    assert sampler().sample(x, [request(top_k=5)])[0].failed


def test_a_row_whose_tokens_are_all_excluded_says_so():
    [found] = sampler().sample(logits(), [request(allowed_token_ids=[EOS], min_tokens=3)])
    assert found.token_id == -1 and "allowed_token_ids" in found.failed


def test_a_bias_too_large_for_float32_fails_its_row_only():
    found = sampler().sample(logits(2), [request("a", logit_bias={1: 1e300}), request("b")])
    assert "too large" in found[0].failed and found[1].failed is None


def test_extreme_repetition_penalties_do_not_end_the_batch():
    rows = [request("a", repetition_penalty=1e300), request("b", repetition_penalty=1e-300), request("c")]
    assert sampler().sample(logits(3), rows)[2].failed is None


@pytest.mark.parametrize(
    "field",
    [{"logit_bias": {VOCAB: 1.0}}, {"allowed_token_ids": [1, -1]}, {"stop_token_ids": [VOCAB + 8]}],
    ids=lambda field: next(iter(field)),
)
def test_a_token_outside_the_vocabulary_is_refused_by_the_name_of_its_field(field):
    with pytest.raises(InvalidParameter, match="0 to 49") as caught:
        check_token_ids(SamplingParams(**field), VOCAB)
    assert caught.value.param == next(iter(field))
    with pytest.raises(InvalidParameter):
        sampler().add(request(**field))


def test_the_last_token_of_the_vocabulary_is_not_refused():
    check_token_ids(SamplingParams(logit_bias={VOCAB - 1: 1}, allowed_token_ids=[0], stop_token_ids=[0]), VOCAB)
