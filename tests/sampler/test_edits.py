"""What a request asks to change before a token is drawn: masks, bias, penalties, bad words."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sampling import EOS, VOCAB, draws, logits, near_edge, request, sampler, tokens

from core.errors import InvalidParameter
from core.sampler import bad_word_ids
from core.sampling.draw import uniform


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
