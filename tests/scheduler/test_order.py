"""Who runs first: priority, arrival, and nobody overtakes."""

from __future__ import annotations

from scheduling import ask, finish, make, ran, run, run_to_the_end

from core.request import Status


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
