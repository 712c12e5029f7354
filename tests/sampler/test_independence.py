"""What must not matter to a request's tokens: who is beside it, in which order, and what was forgotten meanwhile."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import logits, request, sampler, tokens


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
