"""What one step runs, done and in the making, and requests in the order in which they come to it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from core.request import Request, ScheduledTokens
from core.window_blocks import WindowPool

Key = tuple[int, int, float, int]  # (priority, 0 once admitted else 1, arrival, serial number)


@dataclass(frozen=True)
class Schedule:
    """One step. A preempted request has no entry."""

    entries: list[ScheduledTokens]  # decodes first
    preempted: list[Request]  # they lost their blocks; the model has to forget their other state

    @property
    def num_tokens(self) -> int:
        return sum(entry.count for entry in self.entries)


class Line:
    """Requests in order of their keys."""

    def __init__(self) -> None:
        self._keys: list[Key] = []
        self.requests: list[Request] = []

    def __len__(self) -> int:
        return len(self.requests)

    def insert(self, key: Key, request: Request) -> None:
        insort(self._keys, key)
        self.requests.insert(bisect_left(self._keys, key), request)

    def remove(self, key: Key) -> None:
        index = bisect_left(self._keys, key)
        assert self._keys[index] == key
        del self._keys[index], self.requests[index]


@dataclass
class Step:
    """A schedule in the making."""

    budget: int  # tokens left
    windows: Sequence[WindowPool]
    entries: dict[str, ScheduledTokens] = field(default_factory=dict)
    preempted: list[Request] = field(default_factory=list)
    admitted: int = 0

    def run(self, request: Request, count: int) -> None:
        start = request.num_computed
        for window, table in zip(self.windows, request.window_tables, strict=True):
            window.cover(table, start, start + count)
        self.entries[request.id] = ScheduledTokens(request, start, count)
        self.budget -= count

    def add_drafts(self, entry: ScheduledTokens, drafts: tuple[int, ...]) -> None:
        request, count = entry.request, entry.count + len(drafts)
        for window, table in zip(self.windows, request.window_tables, strict=True):
            window.cover(table, entry.start, entry.start + count)
        self.entries[request.id] = ScheduledTokens(request, entry.start, count, drafts)
        self.budget -= len(drafts)

    def drop(self, request: Request) -> None:
        self.preempted.append(request)
        entry = self.entries.pop(request.id, None)
        if entry is not None:
            self.budget += entry.count
