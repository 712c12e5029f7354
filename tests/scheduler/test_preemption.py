"""Blocks: who waits for them, who is preempted for them, and when he comes back."""

from __future__ import annotations

from scheduling import ask, finish, make, ran, run, run_to_the_end

from core.scheduler import Scheduler


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
