"""The sampler against plain references, one parameter at a time; then what must not matter: batch, order, dtype."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidParameter
from core.request import Request
from core.sampler import Sampler, bad_word_ids, check_token_ids
from core.sampling.draw import uniform
from core.sampling_params import SamplingParams

VOCAB = 50
EOS = 7


def request(name="r", prompt=(1, 2, 3), output=(), seed=0, **params):
    made = Request(name, list(prompt), SamplingParams(**params), max_tokens=100, seed=seed)
    made.output_ids = list(output)
    return made


def logits(rows=1, vocab=VOCAB, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def sampler(vocab=VOCAB):
    return Sampler(vocab, [EOS])


def tokens(found):
    assert all(token.failed is None for token in found), found
    return [token.token_id for token in found]


def draws(row, count=4000, **params):
    """Sample one row's distribution many times, each with a seed of its own."""
    vocab = row.shape[-1]
    rows = [request(f"r{seed}", seed=seed, **params) for seed in range(count)]
    return Counter(tokens(sampler(vocab).sample(row.expand(count, vocab), rows)))


def reference(row, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities of one row, written as the definitions read."""
    scores = row.double().numpy() / temperature
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    probs = np.exp(scores - scores.max())
    kept = order[:top_k] if top_k > 0 else order
    share, nucleus, total = 0.0, [], probs[kept].sum()
    for token in kept:
        if share >= top_p:
            break
        nucleus.append(token)
        share += probs[token] / total
    final = [token for token in nucleus if probs[token] >= min_p * probs[order[0]]]
    out = np.zeros(len(scores))
    out[final] = probs[final] / probs[final].sum()
    return out


# ------------------------------------------------------------------------------------------------ greedy


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


# ------------------------------------------------------------------------------------ masks, bias, penalties


def greedy_edited(x, **kwargs):
    return tokens(sampler(x.shape[1]).sample(x, [request(temperature=0, **kwargs)]))[0]


def test_only_allowed_tokens_are_chosen():
    x = logits()
    assert greedy_edited(x, allowed_token_ids=[5, 11, 40]) == max((5, 11, 40), key=lambda token: float(x[0, token]))
    assert set(draws(x[0], 300, allowed_token_ids=[5, 11, 40])) <= {5, 11, 40}


def test_logit_bias_is_added_and_minus_infinity_bans():
    x = torch.zeros(1, VOCAB)
    x[0, 3], x[0, 4] = 2.0, 1.5
    assert greedy_edited(x, logit_bias={4: 1.0}) == 4
    assert greedy_edited(x, logit_bias={4: 0.4}) == 3
    assert greedy_edited(x, logit_bias={3: -math.inf}) == 4


def test_a_bias_does_not_bring_back_a_token_that_is_not_allowed():
    x = torch.zeros(1, VOCAB)
    assert greedy_edited(x, allowed_token_ids=[6], logit_bias={9: 100.0}) == 6


@pytest.mark.parametrize("output_length", [0, 1, 2, 3])
def test_no_end_and_no_stop_token_comes_before_min_tokens(output_length):
    x = torch.zeros(1, VOCAB)
    x[0, EOS], x[0, 12], x[0, 20] = 5.0, 4.0, 3.0
    found = greedy_edited(x, output=[1] * output_length, min_tokens=2, stop_token_ids=[12])
    assert found == (20 if output_length < 2 else EOS)


def test_repetition_penalty_weakens_tokens_of_prompt_and_output():
    x = penalised_logits()
    prompt, output = [3, 8, 3], [8, 21]
    expected = x[0].clone()
    for token in {3, 8, 21}:
        expected[token] = expected[token] / 1.7 if expected[token] > 0 else expected[token] * 1.7
    assert_distribution(x, expected, prompt=prompt, output=output, repetition_penalty=1.7)


def test_presence_and_frequency_penalties_count_the_output_only():
    x = penalised_logits()
    prompt, output = [3, 3, 3], [8, 8, 21]
    expected = x[0].clone()
    expected[8] -= 0.9 + 2 * 0.6
    expected[21] -= 0.9 + 0.6
    assert_distribution(x, expected, prompt=prompt, output=output, presence_penalty=0.9, frequency_penalty=0.6)


def penalised_logits():
    """Logits in which tokens 3, 8 and 21 weigh much, 8 with a negative one."""
    x = logits(scale=0.5) - 3
    x[0, 3], x[0, 8], x[0, 21] = 1.0, -0.5, 0.8
    return x


def assert_distribution(x, expected_logits, **kwargs):
    """Read the edited logits back through the draw itself: the probabilities of 2,000 numbers."""
    count = 2000
    rows = [request(f"r{seed}", seed=seed, **kwargs) for seed in range(count)]
    found = tokens(sampler().sample(x.expand(count, VOCAB), rows))
    cumulative = expected_logits.double().softmax(-1).cumsum(-1).numpy()
    for row, token in zip(rows, found, strict=True):
        number = uniform(row.seed, len(row.output_ids))
        assert token == np.searchsorted(cumulative, number, side="right") or near_edge(cumulative, number)


def near_edge(cumulative, number):
    """The draw works on float32 probabilities: a number this close to a boundary may fall on either side."""
    return np.abs(cumulative - number).min() < 1e-6


def test_penalties_follow_an_output_that_grows_step_by_step():
    """The counts are kept from step to step; a sampler that sees the request for the first time must agree."""
    kept, x = sampler(), logits(60, scale=1.0)
    params = {"temperature": 0, "frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.2}
    grown = request("grown", **params)
    for step in range(60):
        fresh = request("fresh", output=grown.output_ids, **params)
        row = x[step : step + 1]
        [token] = tokens(kept.sample(row, [grown]))
        assert [token] == tokens(sampler().sample(row, [fresh]))
        grown.output_ids.append(token)


def test_a_released_request_leaves_nothing_to_the_next_of_its_name():
    x, shared = torch.zeros(1, VOCAB), sampler()
    x[0, 4], x[0, 5] = 1.0, 0.5
    old = request("same", temperature=0, presence_penalty=2.0, output=[4])
    assert tokens(shared.sample(x, [old])) == [5]
    shared.release("same")
    shared.release("never seen")
    assert tokens(shared.sample(x, [request("same", temperature=0, presence_penalty=2.0)])) == [4]


# ------------------------------------------------------------------------------------------------ bad words


class Letters:
    """A tokenizer of one token for each letter, with a joined token for ' a'."""

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        joined = [30] if text.startswith(" a") else []
        return joined + [ord(letter) - ord("a") + 1 if letter != " " else 0 for letter in text[2 * len(joined) :]]


def test_bad_words_are_spelt_with_and_without_a_space_before_them():
    assert bad_word_ids(Letters(), ["ab", "c"]) == [[1, 2], [30, 2], [3], [0, 3]]
    assert bad_word_ids(Letters(), [" ab"]) == [[1, 2], [30, 2]]


class Deaf(Letters):
    def encode(self, text, add_special_tokens=True):
        return []


def test_a_bad_word_without_tokens_is_refused():
    with pytest.raises(InvalidParameter) as caught:
        bad_word_ids(Deaf(), ["x"])
    assert caught.value.param == "bad_words"


def test_a_bad_word_of_one_token_never_comes():
    x = torch.zeros(1, VOCAB)
    x[0, 9], x[0, 4] = 2.0, 1.0
    banned, shared = request(temperature=0, bad_words=["x"]), sampler()
    shared.add(banned, [[9]])
    assert tokens(shared.sample(x, [banned])) == [4]


def test_the_last_token_of_a_bad_word_is_banned_after_the_others_only():
    x = torch.zeros(1, VOCAB)
    x[0, 9], x[0, 4] = 2.0, 1.0
    banned, shared = request(temperature=0, prompt=[5, 6], bad_words=["x"]), sampler()
    shared.add(banned, [[5, 6, 9]])
    for output, expected in (([], 9), ([5], 9), ([5, 6], 4), ([1, 5, 6], 4), ([5, 6, 1], 9)):
        banned.output_ids = output
        assert tokens(shared.sample(x, [banned])) == [expected], output


def test_a_bad_word_that_this_model_cannot_spell_changes_nothing():
    shared, banned = sampler(), request(temperature=0, bad_words=["x"])
    shared.add(banned, [[VOCAB + 3]])
    x = logits()
    assert tokens(shared.sample(x, [banned])) == x.argmax(-1).tolist()


# --------------------------------------------------------------------------------------------- distribution


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


# ---------------------------------------------------------------------------------------------- independence


def mixed_rows():
    rows = [
        request("greedy", temperature=0),
        request("plain", seed=1),
        request("top", seed=2, top_k=5, top_p=0.9),
        request("nucleus", seed=3, top_p=0.6, temperature=1.5, logprobs=4),
        request("min", seed=4, min_p=0.2, logprobs=0),
        request("penalised", seed=5, repetition_penalty=1.5, frequency_penalty=0.4, output=[4, 4, 9]),
        request("greedy penalised", temperature=0, presence_penalty=1.0, output=[2, 3], logprobs=2),
        request("allowed", seed=6, allowed_token_ids=[1, 2, 30], min_tokens=5, logit_bias={2: 1.0}),
        request("wide", seed=7, top_p=0.999, temperature=3.0),
    ]
    return rows


@pytest.mark.parametrize("vocab", [50, 3000])
def test_a_mixed_batch_gives_each_row_what_it_gets_alone(vocab):
    rows, x = mixed_rows(), logits(len(mixed_rows()), vocab)
    together = sampler(vocab).sample(x, rows)
    for row, made in enumerate(rows):
        [alone] = sampler(vocab).sample(x[row : row + 1], [made])
        assert alone.token_id == together[row].token_id, made.id
        if alone.logprobs is None:
            assert together[row].logprobs is None
            continue
        assert list(alone.logprobs) == list(together[row].logprobs)
        for token, found in alone.logprobs.items():
            assert found.logprob == pytest.approx(together[row].logprobs[token].logprob, abs=1e-5)
            assert found.rank == together[row].logprobs[token].rank


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(9)))
def test_the_order_of_the_batch_does_not_matter(order):
    rows, x = mixed_rows(), logits(9)
    plain = tokens(sampler().sample(x, rows))
    shuffled = tokens(sampler().sample(x[list(order)], [rows[at] for at in order]))
    assert shuffled == [plain[at] for at in order]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    def stream(seed):
        made, shared = request(seed=seed), sampler()
        for step in range(20):
            made.output_ids += tokens(shared.sample(logits(seed=step, scale=1.0), [made]))
        return made.output_ids

    assert stream(11) == stream(11)
    assert stream(11) != stream(12)


def test_a_sampler_that_forgot_a_preempted_request_goes_on_with_the_same_tokens():
    made, shared = request(seed=5, frequency_penalty=1.0), sampler()
    twin, other = request(seed=5, frequency_penalty=1.0), sampler()
    for step in range(20):
        x = logits(seed=step, scale=1.0)
        made.output_ids += tokens(shared.sample(x, [made]))
        other.release(twin.id)
        twin.output_ids += tokens(other.sample(x, [twin]))
    assert made.output_ids == twin.output_ids


# ------------------------------------------------------------------------------------------------- failures


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


# ------------------------------------------------------------------------------------------------- logprobs


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
