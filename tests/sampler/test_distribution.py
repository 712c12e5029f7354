"""Drawn tokens come as often as the definition of temperature, top-k, top-p and min-p says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import VOCAB, draws, logits, near_edge, reference, request, sampler, tokens

from core.sampling.draw import uniform


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.7, "min_p": 0.05, "temperature": 1.6},
    ],
    ids=str,
)
def test_tokens_come_as_often_as_the_definition_says(params):
    """Chi-squared over 4,000 fixed seeds; the bound is the 99.99 % point for at most 49 degrees of freedom."""
    row, count = logits(seed=5, scale=1.5)[0], 4000
    expected, found = reference(row, **params) * count, draws(row, count, **params)
    assert set(found) <= set(np.flatnonzero(expected))
    usual = expected >= 5
    rest = expected[~usual].sum()
    score = sum((found[token] - expected[token]) ** 2 / expected[token] for token in np.flatnonzero(usual))
    score += (sum(found[token] for token in np.flatnonzero(~usual)) - rest) ** 2 / max(rest, 1.0)
    assert score < 97


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    ties=st.booleans(),
    top_k=st.sampled_from([0, -1, 1, 2, 7, 49, 50, 500]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
)
def test_only_tokens_that_the_filters_keep_are_drawn(seed, ties, top_k, top_p, min_p, temperature):
    row = logits(seed=seed % 1000, scale=2.0)[0]
    row = row.round() if ties else row
    params = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": temperature}
    kept = set(np.flatnonzero(reference(row, **params)))
    if ties:  # on the edge of a sum of equal shares, one rounding more or less decides
        kept |= set(np.flatnonzero(reference(row, **{**params, "top_p": min(1.0, top_p + 1e-6)})))
    if top_k <= 0 and top_p == 1 and min_p and ties:  # min_p exactly on a weight of float32
        kept |= set(np.flatnonzero(reference(row, **{**params, "min_p": min_p * (1 - 1e-6)})))
    assert set(draws(row, 30, **params)) <= kept


def test_top_k_keeps_the_lowest_ids_of_equal_logits():
    assert set(draws(torch.zeros(VOCAB), 200, top_k=3)) == {0, 1, 2}


@pytest.mark.parametrize("top_k", [0, 2000, 18000])
def test_a_nucleus_wider_than_the_first_candidates_is_sampled_whole(top_k):
    """The sampler looks at 64 candidates, then at 1,024, at 16,384, then at all."""
    vocab = 20000
    row = logits(vocab=vocab, scale=0.01)[0]
    kept = np.flatnonzero(reference(row, top_p=0.95, top_k=top_k))
    first = set(row.argsort(descending=True)[: 1024 if top_k == 2000 else 16384].tolist())
    found = draws(row, 100, top_p=0.95, top_k=top_k)
    assert set(found) <= set(kept)
    assert len(set(found) - first) > 3


def test_the_cumulative_sum_over_many_spans_is_inverted_exactly():
    vocab = 1000  # not a multiple of the sampler's span
    row = logits(vocab=vocab)[0]
    cumulative = row.double().softmax(-1).cumsum(-1).numpy()
    rows = [request(f"r{seed}", seed=seed) for seed in range(500)]
    for made, token in zip(rows, tokens(sampler(vocab).sample(row.expand(500, vocab), rows)), strict=True):
        number = uniform(made.seed, 0)
        assert token == np.searchsorted(cumulative, number, side="right") or near_edge(cumulative, number)


def test_a_very_low_temperature_is_greedy_and_does_not_overflow():
    row = logits()[0]
    for temperature in (1e-300, 1e-12, 1e-5):
        assert set(draws(row, 20, temperature=temperature)) == {int(row.argmax())}
        assert set(draws(row, 20, temperature=temperature, top_p=0.9)) == {int(row.argmax())}


def test_the_uniform_numbers_are_uniform_and_lie_below_one():
    numbers = np.array([[uniform(seed, step) for step in range(100)] for seed in range(100)])
    assert 0 <= numbers.min() and numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
    assert ((counts - 200) ** 2 / 200).sum() < 100
    for neighbour in (numbers[:, 1:] * numbers[:, :-1], numbers[1:] * numbers[:-1]):  # uncorrelated: mean 1/4
        assert abs(neighbour.mean() - 0.25) < 0.01


def test_negative_and_very_large_seeds_have_streams_of_their_own():
    seeds = [-(2**63) + 1, -1, 0, 1, 2**63 - 1]
    assert len({uniform(seed, 0) for seed in seeds}) == len(seeds)
