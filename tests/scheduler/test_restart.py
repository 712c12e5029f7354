"""A text that outgrows what the model was prepared for is computed anew, once."""

from __future__ import annotations

from scheduling import ask, finish, make, run_to_the_end

from core.blocks import BlockPool
from core.reach import Reach
from core.scheduler import Scheduler, SchedulerLimits
from core.window_blocks import WindowPool, most_blocks


def test_a_text_that_grows_past_the_models_threshold_is_computed_anew_once() -> None:
    scheduler = make(restart_after=8, max_num_batched_tokens=4)
    scheduler.add(ask("a", 7, max_tokens=5))  # 8 tokens after its prompt, 9 after one decode
    steps = [step["a"] for step in run_to_the_end(scheduler)]
    assert steps == [4, 3, 1, 4, 4, 1, 1, 1]


def test_a_prompt_past_that_threshold_runs_once() -> None:
    scheduler = make(restart_after=8)
    scheduler.add(ask("a", 9, max_tokens=3))
    assert [step["a"] for step in run_to_the_end(scheduler)] == [9, 1, 1]


def test_its_windows_are_filled_anew_too() -> None:
    reach = Reach(window=3)
    window = WindowPool(reach, most_blocks(reach, 4, 4, 16), 4)
    limits = SchedulerLimits(4, 4, 100, 10, restart_after=16)
    scheduler = Scheduler(BlockPool(20, 4), limits, [window])
    request = ask("a", 15, max_tokens=6)
    scheduler.add(request)
    while not request.is_finished:
        schedule = scheduler.schedule()
        for entry in schedule.entries:
            (table,) = entry.request.window_tables
            assert table.first * 4 <= reach.oldest(entry.start), "a token of this step sees a block that is gone"
        finish(scheduler, schedule)
    window.check([])
