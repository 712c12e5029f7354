"""What of a prompt is taken from the prefix cache, and what is entered into it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from scheduling import ask, make, run, run_to_the_end


def test_a_repeated_prompt_runs_only_what_is_not_cached() -> None:
    scheduler = make()
    prompt = list(range(10))
    scheduler.add(ask("a", prompt))
    run(scheduler)
    again = ask("b", [*prompt, 77])
    scheduler.add(again)
    assert run(scheduler) == {"a": 1, "b": 3}
    assert again.num_cached == 8


def test_the_last_prompt_token_is_computed_even_when_all_is_cached() -> None:
    scheduler = make()
    for name in "ab":
        request = ask(name, list(range(8)), max_tokens=1)
        scheduler.add(request)
        run_to_the_end(scheduler)
    assert request.num_cached == 4


def test_output_is_cached_too_so_that_the_next_turn_of_a_chat_finds_it() -> None:
    scheduler = make()
    scheduler.add(ask("a", list(range(4)), max_tokens=9))
    run_to_the_end(scheduler)
    turn = ask("b", [0, 1, 2, 3, *[7] * 9, 5])
    scheduler.add(turn)
    run(scheduler)
    assert turn.num_cached == 12


def test_requests_that_computed_the_same_prompt_together_share_its_blocks_afterwards() -> None:
    scheduler = make()
    requests = [ask(name, list(range(8))) for name in "abc"]
    for request in requests:
        scheduler.add(request)
    assert run(scheduler) == {"a": 8, "b": 8, "c": 8}
    assert requests[0].block_ids == requests[1].block_ids == requests[2].block_ids
    run(scheduler)
    assert len({request.block_ids[2] for request in requests}) == 3
    scheduler.pool.check([request.block_ids for request in requests])


def test_prompt_logprobs_need_every_prompt_token_so_nothing_is_taken_from_the_cache_but_all_is_entered() -> None:
    scheduler = make()
    prompt = list(range(9))
    for name, params, cached in (("a", {"prompt_logprobs": 0}, 0), ("b", {"prompt_logprobs": 1}, 0), ("c", {}, 8)):
        request = ask(name, prompt, max_tokens=1, **params)
        scheduler.add(request)
        assert run_to_the_end(scheduler) == [{name: 9 - cached}]
        assert request.num_cached == cached


@pytest.mark.parametrize("off", ["prefix_caching", "chunked_prefill"])
def test_without_prefix_caching_or_chunks_nothing_is_cached(off: str) -> None:
    scheduler = make(**{off: False})
    for name in "ab":
        scheduler.add(ask(name, list(range(8)), max_tokens=1))
        assert run_to_the_end(scheduler) == [{name: 8}]
    assert scheduler.pool.num_cached == 0


def test_num_cached_is_that_of_the_first_admission() -> None:
    scheduler = make(max_num_seqs=1)
    low = ask("l", 8, priority=5)
    scheduler.add(low)
    run(scheduler)
    scheduler.add(ask("h", 4, max_tokens=1))
    run(scheduler)
    assert run(scheduler) == {"l": 1}
    assert (low.num_preemptions, low.num_computed, low.num_cached) == (1, 9, 0)


def test_after_a_reset_running_requests_go_on_and_new_ones_find_nothing_old() -> None:
    scheduler = make()
    old = ask("a", list(range(8)), max_tokens=12)
    scheduler.add(old)
    run(scheduler)
    scheduler.pool.reset_prefix_cache()
    new = ask("b", list(range(9)))
    scheduler.add(new)
    run(scheduler)
    assert new.num_cached == 0
    run_to_the_end(scheduler)
    assert old.output_ids == [7] * 12


def test_a_request_blocked_for_blocks_does_not_search_the_cache_in_every_step() -> None:
    scheduler = make(num_blocks=32)
    scheduler.add(ask("a", 4, max_tokens=100))
    run(scheduler)
    scheduler.add(ask("b", 120))
    searches: list[int] = []
    match = scheduler.pool.match

    def counted(token_ids: Sequence[int], max_tokens: int) -> list[int]:
        searches.append(max_tokens)
        return match(token_ids, max_tokens)

    scheduler.pool.match = counted  # type: ignore[method-assign]
    for _ in range(20):
        assert run(scheduler) == {"a": 1}
    assert len(searches) == 1
    scheduler.abort("a")
    assert run(scheduler) == {"b": 32}
