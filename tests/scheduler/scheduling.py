"""What the scheduler's tests share. A step here samples token 7 for every request that reaches its last known token."""

from __future__ import annotations

from typing import Any

from core.blocks import BlockPool
from core.request import FinishReason, Request
from core.sampling_params import SamplingParams
from core.schedule import Schedule
from core.scheduler import Scheduler, SchedulerLimits

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
    scheduler.advance(schedule.entries, [[7] if entry.samples else [] for entry in schedule.entries])
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
