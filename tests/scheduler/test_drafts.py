"""Guessed tokens behind decodes: they take what is left, and leave nothing behind when they are wrong."""

from __future__ import annotations

from scheduling import SIZE, ask, ran

from core.blocks import BlockPool
from core.request import ScheduledTokens
from core.scheduler import Scheduler, SchedulerLimits
from core.speculation import Drafter, LookupLimits

REPEATING = [1, 2, 3, 4, 5, 1, 2]  # goes on as 3, 4, 5, 1, 2, ...


def make(num_blocks: int = 64, budget: int = 32) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, SIZE), SchedulerLimits(8, budget, 256, 100), drafter=Drafter(LookupLimits(3, 2, 6))
    )


def decode(scheduler: Scheduler, first: int = 3) -> None:
    """Run the prompts; each request then has one token left to run."""
    entries = scheduler.schedule().entries
    scheduler.advance(entries, [[first] for _ in entries])


def only(scheduler: Scheduler) -> ScheduledTokens:
    (entry,) = scheduler.schedule().entries
    return entry


def test_guesses_run_behind_the_last_known_token() -> None:
    scheduler = make()
    scheduler.add(ask("a", REPEATING, max_tokens=20))
    decode(scheduler)
    entry = only(scheduler)
    assert (entry.start, entry.count, entry.drafts) == (7, 7, (4, 5, 1, 2, 3, 4))
    assert entry.token_ids() == [3, 4, 5, 1, 2, 3, 4]
    assert entry.num_sampled == 7


def test_accepted_guesses_are_computed_and_the_others_leave_no_block_behind() -> None:
    scheduler = make()
    request = ask("a", REPEATING, max_tokens=20)
    scheduler.add(request)
    decode(scheduler)
    entry = only(scheduler)
    assert len(request.block_ids) == 4
    scheduler.advance([entry], [[4, 5, 9]])
    assert (request.output_ids, request.num_computed) == ([3, 4, 5, 9], 10)
    assert len(request.block_ids) == 3
    assert scheduler.pool.num_cached == 2  # tokens 0 to 7, not those of the third block that were guessed wrong
    scheduler.pool.check([request.block_ids])


def test_guesses_take_the_budget_that_prompts_leave() -> None:
    scheduler = make(budget=12)
    scheduler.add(ask("a", REPEATING, max_tokens=20))
    decode(scheduler)
    scheduler.add(ask("b", 9))
    assert ran(scheduler.schedule()) == {"a": 3, "b": 9}


def test_guesses_take_free_blocks_only() -> None:
    scheduler = make(num_blocks=3)
    request = ask("a", REPEATING, max_tokens=5)
    scheduler.add(request)
    decode(scheduler)
    scheduler.pool.allocate(scheduler.pool.num_free)  # somebody else has the rest
    assert only(scheduler).drafts == ()
    assert len(request.block_ids) == 2
