"""Who is let into the queue, and with which words the others are refused."""

from __future__ import annotations

import pytest
from scheduling import ask, make, run, run_to_the_end

from core.errors import InvalidParameter, Overloaded, PromptTooLong


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
