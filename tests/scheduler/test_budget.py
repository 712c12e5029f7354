"""How a step's tokens are shared out: chunks, decodes first, seats."""

from __future__ import annotations

import pytest
import torch
from scheduling import ask, finish, make, run, run_to_the_end

from core.config import EngineConfig
from core.engine_build import mixed_prefill_tokens


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


def test_beside_decodes_prompts_of_a_step_get_a_smaller_budget_together() -> None:
    scheduler = make(max_num_batched_tokens=12, max_mixed_prefill_tokens=5)
    scheduler.add(ask("a", 20))
    assert run(scheduler) == {"a": 12}
    assert run(scheduler) == {"a": 8}
    scheduler.add(ask("b", 4))
    scheduler.add(ask("c", 6))
    assert run(scheduler) == {"a": 1, "b": 4, "c": 1}
    assert run(scheduler) == {"a": 1, "b": 1, "c": 5}


def test_the_smaller_budget_leaves_prompts_that_cannot_be_cut_alone() -> None:
    scheduler = make(max_num_batched_tokens=12, max_mixed_prefill_tokens=5, chunked_prefill=False)
    scheduler.add(ask("a", 4))
    run(scheduler)
    scheduler.add(ask("b", 5))
    scheduler.add(ask("c", 6))
    assert run(scheduler) == {"a": 1, "b": 5, "c": 6}


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
    scheduler.advance(first, [[]])
    assert (request.num_computed, request.output_ids) == (8, [])
    second = scheduler.schedule().entries
    assert [entry.samples for entry in second] == [True]
    scheduler.advance(second, [[5]])
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


@pytest.mark.parametrize(("device", "asked", "tokens"), [("cpu", None, 16), ("cuda", None, None), ("cuda", 7, 7)])
def test_prompts_beside_decodes_are_held_back_on_a_cpu_unless_asked_otherwise(device, asked, tokens) -> None:
    config = EngineConfig(max_mixed_prefill_tokens=asked)
    assert mixed_prefill_tokens(config, torch.device(device)) == tokens
