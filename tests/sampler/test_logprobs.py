"""Logprobs of chosen, best and prompt tokens, against the model's own distribution."""

from __future__ import annotations

import math

import pytest
import torch
from sampling import VOCAB, logits, request, sampler

from core.sampler import Sampler


def test_logprobs_are_of_the_models_own_distribution():
    """Neither penalties nor temperature nor masks show in them."""
    x = logits()
    made = request(temperature=3.0, logit_bias={2: 9.0}, repetition_penalty=1.5, allowed_token_ids=[2, 3], logprobs=5)
    [found] = sampler().sample(x, [made])
    expected = x[0].log_softmax(-1)
    for token, entry in found.logprobs.items():
        assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-5)
        assert entry.rank == int((expected > expected[token]).sum()) + 1


def test_the_chosen_token_comes_first_then_the_best_in_order():
    x = logits()
    best = x[0].argsort(descending=True).tolist()
    [found] = sampler().sample(x, [request(allowed_token_ids=[best[10]], logprobs=3)])
    assert list(found.logprobs) == [best[10], *best[:3]]
    [found] = sampler().sample(x, [request(allowed_token_ids=[best[1]], logprobs=3)])
    assert list(found.logprobs) == [best[1], best[0], best[2]]
    assert [entry.rank for entry in found.logprobs.values()] == [2, 1, 3]


def test_logprobs_zero_gives_the_chosen_token_only_and_none_gives_none():
    found = sampler().sample(logits(2), [request("a", logprobs=0), request("b")])
    assert list(found[0].logprobs) == [found[0].token_id] and found[1].logprobs is None


def test_equal_logprobs_are_ranked_by_lowest_id():
    x = torch.zeros(1, VOCAB)
    [found] = sampler().sample(x, [request(allowed_token_ids=[30], logprobs=3)])
    assert list(found.logprobs) == [30, 0, 1, 2]
    assert [entry.rank for entry in found.logprobs.values()] == [31, 1, 2, 3]


def test_more_logprobs_than_tokens_give_every_token():
    [found] = Sampler(5).sample(logits(vocab=5), [request(prompt=[1], logprobs=20)])
    assert sorted(found.logprobs) == [0, 1, 2, 3, 4]


def test_prompt_logprobs_are_those_of_the_given_tokens():
    x, ids = logits(4), [3, 9, 0, 49]
    found = sampler().prompt_logprobs(x, ids, 2)
    expected = x.log_softmax(-1)
    for row, token in enumerate(ids):
        best = expected[row].argsort(descending=True)[:2].tolist()
        assert list(found[row]) == list(dict.fromkeys([token, *best]))
        assert found[row][token].logprob == pytest.approx(float(expected[row, token]), abs=1e-5)


def test_prompt_logprobs_of_many_rows_do_not_depend_on_how_they_are_split():
    vocab = 3_000_000  # one row at a time
    x = torch.arange(vocab).remainder(1000).float().expand(3, vocab)
    assert [next(iter(table)) for table in Sampler(vocab).prompt_logprobs(x, [999, 5, 6], 1)] == [999, 5, 6]


def test_nan_logits_give_nan_prompt_logprobs_and_spare_the_other_rows():
    x = logits(2)
    x[0] = math.nan
    broken, whole = sampler().prompt_logprobs(x, [1, 2], 3)
    assert list(broken) == [1] and math.isnan(broken[1].logprob)
    assert whole == sampler().prompt_logprobs(x[1:], [2], 3)[0]
