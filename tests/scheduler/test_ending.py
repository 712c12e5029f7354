"""Cancelled and completed requests free their blocks, at whatever moment."""

from __future__ import annotations

from scheduling import ask, finish, make, run, run_to_the_end

from core.request import FinishReason, Status


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
    scheduler.advance(entries, [[1], [2]])
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
