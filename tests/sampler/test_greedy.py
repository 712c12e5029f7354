"""Greedy sampling: the highest logit, the lowest id of equal ones, and the caller's logits left alone."""

from __future__ import annotations

import pytest
import torch
from sampling import VOCAB, logits, request, sampler, tokens


def test_temperature_zero_takes_the_highest_logit():
    x = logits(5)
    assert tokens(sampler().sample(x, [request(str(i), temperature=0) for i in range(5)])) == x.argmax(-1).tolist()


def test_of_equal_logits_greedy_takes_the_lowest_id():
    x = torch.zeros(2, VOCAB)
    x[1, [9, 4, 30]] = 1.0
    assert tokens(sampler().sample(x, [request("a", temperature=0), request("b", temperature=0)])) == [0, 4]


def test_no_rows_give_no_tokens():
    assert sampler().sample(torch.zeros(0, VOCAB), []) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_what_their_float32_values_give(dtype):
    x = logits(4).to(dtype)
    rows = [
        request("a", temperature=0, logprobs=3),
        request("b", seed=1, logprobs=2),
        request("c", seed=2, top_k=5),
        request("d", seed=3, repetition_penalty=1.3),
    ]
    assert sampler().sample(x, rows) == sampler().sample(x.float(), rows)


def test_the_logits_of_the_caller_stay_as_they_are():
    x = logits(2)
    before = x.clone()
    sampler().sample(x, [request("a", logit_bias={3: 5.0}), request("b", repetition_penalty=2.0, top_p=0.5)])
    assert torch.equal(x, before)
