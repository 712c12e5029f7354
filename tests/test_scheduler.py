"""The scheduler, rule by rule. A step here samples token 7 for every request that reaches its last known token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from core.blocks import BlockPool
from core.errors import InvalidParameter, Overloaded, PromptTooLong
from core.request import FinishReason, Request, Status
from core.sampling_params import SamplingParams
from core.scheduler import Schedule, Scheduler, SchedulerLimits

SIZE = 4


def make(num_blocks: int = 64, **changes: Any) -> Scheduler:
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 256, "max_num_waiting": 100} | changes
    return Scheduler(BlockPool(num_blocks, SIZE), SchedulerLimits(**limits))


def ask(
    name: str, prompt: int | list[int], max_tokens: int = 8, priority: int = 0, arrival: float = 0.0, **params: Any
) -> Request:
    """A request whose prompt is its own (given a length) or the given one."""
    ids = prompt if isinstance(prompt, list) else [ord(name[0]) * 1000 + index for index in range(prompt)]
    return Request(name, ids, SamplingParams(**params), max_tokens, priority=priority, arrival=arrival)


def run(scheduler: Scheduler) -> dict[str, int]:
    """Run one step to its end; return the tokens that ran, by request."""
    return ran(finish(scheduler, scheduler.schedule()))


def ran(schedule: Schedule) -> dict[str, int]:
    return {entry.request.id: entry.count for entry in schedule.entries}


def finish(scheduler: Scheduler, schedule: Schedule) -> Schedule:
    scheduler.advance(schedule.entries, [7 if entry.samples else None for entry in schedule.entries])
    for entry in schedule.entries:
        if len(entry.request.output_ids) == entry.request.max_tokens:
            scheduler.complete(entry.request, FinishReason.LENGTH)
    return schedule


def run_to_the_end(scheduler: Scheduler, most: int = 1000) -> list[dict[str, int]]:
    steps = []
    while scheduler.has_work:
        steps.append(run(scheduler))
        assert len(steps) < most, "the scheduler makes no progress"
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    return steps


# ---------------------------------------------------------------------------------------------- adding


def test_a_prompt_that_could_never_fit_in_the_pool_is_refused_with_the_numbers() -> None:
    scheduler = make(num_blocks=4)
    with pytest.raises(
        PromptTooLong, match=r"10 tokens and max_tokens of 7 make 17.* holds 16 \(4 blocks of 4\)"
    ) as got:
        scheduler.add(ask("a", 10, max_tokens=7))
    assert got.value.param == "max_tokens"
    assert "kv_cache_memory" in str(got.value)
    assert not scheduler.has_work
    scheduler.add(ask("a", 10, max_tokens=6))
    assert len(run_to_the_end(scheduler)) == 6


def test_a_prompt_longer_than_the_model_is_refused_and_the_prompt_is_blamed() -> None:
    scheduler = make(max_model_len=20)
    with pytest.raises(PromptTooLong, match="make 21 tokens; the model's length is 20") as got:
        scheduler.add(ask("a", 20, max_tokens=1))
    assert got.value.param == "prompt"
    with pytest.raises(PromptTooLong):
        scheduler.add(ask("a", 20, max_tokens=0))
    scheduler.add(ask("a", 19, max_tokens=1))


def test_a_full_queue_refuses_and_keeps_nothing() -> None:
    scheduler = make(max_num_waiting=2)
    scheduler.add(ask("a", 4))
    scheduler.add(ask("b", 4))
    with pytest.raises(Overloaded, match="2 requests are waiting and the queue holds 2"):
        scheduler.add(ask("c", 4))
    assert scheduler.abort("c") is None
    run(scheduler)
    scheduler.add(ask("c", 4))
    assert scheduler.num_waiting == 1


def test_an_empty_prompt_and_a_doubled_id_are_refused() -> None:
    scheduler = make()
    with pytest.raises(InvalidParameter, match="empty"):
        scheduler.add(ask("a", []))
    scheduler.add(ask("a", 4))
    with pytest.raises(InvalidParameter, match="'a' is in use"):
        scheduler.add(ask("a", 4))
    assert scheduler.num_waiting == 1


# ---------------------------------------------------------------------------------------------- computed anew


def test_a_text_that_grows_past_the_models_threshold_is_computed_anew_once() -> None:
    scheduler = make(restart_after=8, max_num_batched_tokens=4)
    scheduler.add(ask("a", 7, max_tokens=5))  # 8 tokens after its prompt, 9 after one decode
    steps = [step["a"] for step in run_to_the_end(scheduler)]
    assert steps == [4, 3, 1, 4, 4, 1, 1, 1]


def test_a_prompt_past_that_threshold_runs_once() -> None:
    scheduler = make(restart_after=8)
    scheduler.add(ask("a", 9, max_tokens=3))
    assert [step["a"] for step in run_to_the_end(scheduler)] == [9, 1, 1]


# ---------------------------------------------------------------------------------------------- the budget


def test_a_prompt_is_cut_into_chunks_that_fit_the_budget() -> None:
    scheduler = make(max_num_batched_tokens=8)
    scheduler.add(ask("a", 20, max_tokens=2))
    assert run_to_the_end(scheduler) == [{"a": 8}, {"a": 8}, {"a": 4}, {"a": 1}]


def test_decodes_run_first_and_chunks_get_what_is_left() -> None:
    scheduler = make(max_num_batched_tokens=8)
    scheduler.add(ask("a", 4))
    run(scheduler)
    scheduler.add(ask("b", 20))
    for _ in range(2):
        schedule = finish(scheduler, scheduler.schedule())
        assert [(entry.request.id, entry.count) for entry in schedule.entries] == [("a", 1), ("b", 7)]
    assert run(scheduler) == {"a": 1, "b": 6}
    assert run(scheduler) == {"a": 1, "b": 1}


def test_decodes_run_before_an_older_request_that_still_prefills() -> None:
    scheduler = make(max_num_batched_tokens=4)
    scheduler.add(ask("a", 2, arrival=2))
    run(scheduler)
    scheduler.add(ask("b", 12, arrival=1))
    run(scheduler)
    assert list(run(scheduler).items()) == [("a", 1), ("b", 3)]


def test_an_entry_samples_only_when_it_reaches_the_last_token() -> None:
    scheduler = make(max_num_batched_tokens=8)
    request = ask("a", 10)
    scheduler.add(request)
    first = scheduler.schedule().entries
    assert [entry.samples for entry in first] == [False]
    scheduler.advance(first, [None])
    assert (request.num_computed, request.output_ids) == (8, [])
    second = scheduler.schedule().entries
    assert [entry.samples for entry in second] == [True]
    scheduler.advance(second, [5])
    assert (request.num_computed, request.output_ids) == (10, [5])


def test_seats_bound_the_running_requests() -> None:
    scheduler = make(max_num_seqs=2)
    for name in "abc":
        scheduler.add(ask(name, 2, max_tokens=2))
    assert run_to_the_end(scheduler) == [{"a": 2, "b": 2}, {"a": 1, "b": 1}, {"c": 2}, {"c": 1}]


def test_an_unchunked_prompt_runs_whole_even_over_the_budget() -> None:
    scheduler = make(max_num_batched_tokens=8, chunked_prefill=False)
    scheduler.add(ask("a", 4))
    run(scheduler)
    scheduler.add(ask("b", 20))
    scheduler.add(ask("c", 4))
    assert run(scheduler) == {"a": 1, "b": 20}
    assert run(scheduler) == {"a": 1, "b": 1, "c": 4}


def test_an_unchunked_prompt_that_exceeds_the_rest_of_the_budget_runs_beside_no_other_prompt() -> None:
    scheduler = make(max_num_batched_tokens=8, chunked_prefill=False)
    for name in "abc":
        scheduler.add(ask(name, 4))
    scheduler.add(ask("d", 7))
    assert run(scheduler) == {"a": 4, "b": 4}
    assert run(scheduler) == {"a": 1, "b": 1, "c": 4}
    assert run(scheduler) == {"a": 1, "b": 1, "c": 1, "d": 7}


# ---------------------------------------------------------------------------------------------- order


def test_waiting_requests_start_in_order_of_priority_then_arrival() -> None:
    scheduler = make(max_num_seqs=1)
    for name, priority, arrival in (("a", 1, 0.0), ("b", 0, 5.0), ("c", 0, 3.0), ("d", 1, 0.0), ("e", -1, 9.0)):
        scheduler.add(ask(name, 2, max_tokens=1, priority=priority, arrival=arrival))
    assert run_to_the_end(scheduler) == [{name: 2} for name in "ecbad"]


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_blocks() -> None:
    scheduler = make(num_blocks=8)
    scheduler.add(ask("a", 12, max_tokens=4))
    run(scheduler)
    scheduler.add(ask("b", 24, max_tokens=4))
    scheduler.add(ask("c", 1, max_tokens=4))
    while scheduler.num_running and scheduler.num_waiting == 2:
        assert "c" not in run(scheduler)
    assert set(run(scheduler)) == {"b", "c"}


def test_a_waiting_request_of_higher_priority_takes_the_seat_of_a_lower_one() -> None:
    scheduler = make(max_num_seqs=2)
    low, high = ask("l", 4, priority=5), ask("h", 4, max_tokens=2, priority=1)
    scheduler.add(ask("k", 4, priority=1))
    scheduler.add(low)
    run(scheduler)
    scheduler.add(high)
    schedule = finish(scheduler, scheduler.schedule())
    assert ran(schedule) == {"k": 1, "h": 4}
    assert schedule.preempted == [low]
    assert (low.status, low.block_ids, low.num_computed, low.output_ids) == (Status.WAITING, [], 0, [7])
    run(scheduler)
    assert run(scheduler) == {"k": 1, "l": 1}, "its first four tokens come from the prefix cache"
    run_to_the_end(scheduler)
    assert low.output_ids == [7] * 8


def test_a_preempted_prefill_gives_its_tokens_of_the_step_back() -> None:
    scheduler = make(num_blocks=8, max_num_batched_tokens=12)
    scheduler.add(ask("l", 16, priority=5))
    run(scheduler)
    scheduler.add(ask("h", 20, priority=1))
    assert run(scheduler) == {"h": 12}


def test_an_equal_priority_never_preempts() -> None:
    scheduler = make(max_num_seqs=1)
    scheduler.add(ask("a", 4, priority=1, arrival=5))
    run(scheduler)
    scheduler.add(ask("b", 4, priority=1, arrival=1))
    assert run(scheduler) == {"a": 1}


def test_lower_requests_are_left_alone_when_even_their_blocks_would_not_be_enough() -> None:
    scheduler = make(num_blocks=8)
    scheduler.add(ask("k", 16, priority=1))
    scheduler.add(ask("l", 4, priority=5))
    run(scheduler)
    scheduler.add(ask("h", 20, priority=1))
    assert run(scheduler) == {"k": 1, "l": 1}


# ---------------------------------------------------------------------------------------------- blocks


def test_a_request_alone_may_use_every_block() -> None:
    scheduler = make(num_blocks=4)
    request = ask("a", 16 - 5, max_tokens=5)
    scheduler.add(request)
    run_to_the_end(scheduler)
    assert request.num_preemptions == 0


def test_admission_leaves_a_block_for_each_running_request() -> None:
    scheduler = make(num_blocks=4)
    scheduler.add(ask("a", 4, max_tokens=8))
    run(scheduler)
    scheduler.add(ask("b", 8, max_tokens=2))
    assert run(scheduler) == {"a": 1}, "three blocks are free: two for b would leave one, but a has taken it now"
    assert scheduler.num_waiting == 1


def test_the_last_in_order_is_preempted_when_a_decode_finds_no_block() -> None:
    scheduler = make(num_blocks=5)
    first, second = ask("a", 4, max_tokens=16, arrival=1), ask("b", 4, max_tokens=16, arrival=2)
    scheduler.add(first)
    scheduler.add(second)
    while not (schedule := finish(scheduler, scheduler.schedule())).preempted:
        pass
    assert schedule.preempted == [second] and ran(schedule) == {"a": 1}
    assert second.num_preemptions == 1
    kept = len(second.output_ids)
    assert kept > 0 and second.block_ids == [] and second.num_computed == 0
    run_to_the_end(scheduler)
    assert first.num_preemptions == 0
    assert second.output_ids == [7] * 16


def test_a_step_that_preempted_for_blocks_admits_nobody() -> None:
    def two_that_fill_the_pool() -> Scheduler:
        scheduler = make(num_blocks=5)
        scheduler.add(ask("a", 4, max_tokens=16, arrival=1))
        scheduler.add(ask("b", 4, max_tokens=16, arrival=2))
        return scheduler

    scheduler, calm = two_that_fill_the_pool(), 0
    while not finish(scheduler, scheduler.schedule()).preempted:
        calm += 1
    scheduler = two_that_fill_the_pool()
    for _ in range(calm):
        run(scheduler)
    scheduler.add(ask("d", 1, max_tokens=1, priority=-1))
    assert run(scheduler) == {"a": 1}
    assert run(scheduler) == {"a": 1, "d": 1}


def test_a_blocked_request_starts_as_soon_as_enough_blocks_are_freed() -> None:
    scheduler = make(num_blocks=12)
    scheduler.add(ask("a", 4, max_tokens=12))
    scheduler.add(ask("b", 16, max_tokens=4))
    run(scheduler)
    scheduler.add(ask("c", 20, max_tokens=4))
    assert [run(scheduler) for _ in range(3)] == [{"a": 1, "b": 1}] * 3
    assert run(scheduler) == {"a": 1, "c": 20}


def test_a_blocked_request_starts_when_a_block_comes_back_that_others_had_taken_meanwhile() -> None:
    scheduler = make(num_blocks=8)
    scheduler.add(ask("a", 3, max_tokens=10))
    scheduler.add(ask("b", 1, max_tokens=4))
    run(scheduler)
    scheduler.add(ask("c", 20, max_tokens=2))
    assert [run(scheduler) for _ in range(3)] == [{"a": 1, "b": 1}] * 3
    assert scheduler.pool.num_free == 6, "as many as when c failed: b gave one back, a had taken one"
    assert run(scheduler) == {"a": 1, "c": 20}


def test_a_preempted_request_comes_back_before_new_ones_of_its_priority() -> None:
    scheduler = make(num_blocks=5)
    scheduler.add(ask("a", 4, max_tokens=16, arrival=1))
    scheduler.add(ask("b", 4, max_tokens=16, arrival=2))
    while not finish(scheduler, scheduler.schedule()).preempted:
        pass
    scheduler.add(ask("c", 1, max_tokens=1, arrival=0.5))
    scheduler.add(ask("d", 1, max_tokens=1, priority=-1, arrival=9))
    order = [name for step in run_to_the_end(scheduler) for name in step]
    assert order.index("d") < order.index("b") < order.index("c")


def test_a_request_that_is_last_itself_gives_way() -> None:
    scheduler = make(num_blocks=4)
    old, young = ask("a", 6, max_tokens=10, arrival=1), ask("b", 4, max_tokens=10, arrival=2)
    scheduler.add(old)
    scheduler.add(young)
    run(scheduler)
    assert (scheduler.num_running, scheduler.pool.num_free) == (2, 1)
    filler = scheduler.pool.allocate(1)
    schedule = finish(scheduler, scheduler.schedule())
    assert ran(schedule) == {"a": 1} and schedule.preempted == [young]
    assert filler is not None
    scheduler.pool.free(filler)
    run_to_the_end(scheduler)
    assert len(young.output_ids) == 10 and old.num_preemptions == 0


# ---------------------------------------------------------------------------------------------- ending


def test_a_cancelled_request_frees_its_blocks_in_any_state() -> None:
    scheduler = make(num_blocks=12, max_num_seqs=3, max_num_batched_tokens=8)
    decoding, prefilling, waiting = ask("a", 4), ask("b", 20), ask("c", 4)
    for request in (decoding, prefilling, waiting):
        scheduler.add(request)
    run(scheduler)
    assert (decoding.num_remaining, prefilling.num_computed, waiting.status) == (1, 4, Status.WAITING)
    for request in (prefilling, waiting, decoding):
        assert scheduler.abort(request.id) is request
        assert (request.status, request.finish_reason) == (Status.FINISHED, FinishReason.ABORT)
        assert request.block_ids == []
    assert scheduler.pool.num_used == 0 and not scheduler.has_work
    assert scheduler.abort("a") is None


def test_a_cancelled_preempted_request_does_not_come_back() -> None:
    scheduler = make(num_blocks=5)
    scheduler.add(ask("a", 4, max_tokens=16, arrival=1))
    scheduler.add(ask("b", 4, max_tokens=16, arrival=2))
    while not finish(scheduler, scheduler.schedule()).preempted:
        pass
    assert scheduler.abort("b") is not None
    assert all("b" not in step for step in run_to_the_end(scheduler))


def test_a_request_cancelled_during_its_step_is_ignored_by_advance() -> None:
    scheduler = make()
    gone, stays = ask("a", 4), ask("b", 4)
    scheduler.add(gone)
    scheduler.add(stays)
    entries = scheduler.schedule().entries
    scheduler.abort("a")
    scheduler.advance(entries, [1, 2])
    assert (gone.output_ids, stays.output_ids) == ([], [2])
    scheduler.pool.check([stays.block_ids])


def test_a_cancelled_id_can_be_used_again() -> None:
    scheduler = make()
    scheduler.add(ask("a", 4))
    scheduler.abort("a")
    scheduler.add(ask("a", 4, max_tokens=1))
    assert run_to_the_end(scheduler) == [{"a": 4}]


def test_a_completed_request_keeps_its_output_and_its_reason() -> None:
    scheduler = make()
    request = ask("a", 4)
    scheduler.add(request)
    run(scheduler)
    scheduler.complete(request, FinishReason.STOP)
    assert (request.output_ids, request.finish_reason, request.status) == ([7], FinishReason.STOP, Status.FINISHED)
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.has_work) == (0, 0, False)


# ---------------------------------------------------------------------------------------------- prefix cache


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
