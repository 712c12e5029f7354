"""WindowPool: the blocks of layers that look back only so far. Plain Python, no torch.

Layers that attend to everything keep a block for every block of the text (core/blocks.py). Layers with a sliding window
or chunks need the last few only, so they have a pool of their own, and a table per request whose old entries are given
back as the text grows:

    text's blocks        0  1  2  3  4  5  6  7     the next token is in block 7 and looks back into block 5
    full table           9  2  4  1  8  3  6  0
    window's table       .  .  .  .  .  2  0  5     `first` = 5; what lies before it is free again

What a full block holds is known by the text's block beside it: when that one enters the prefix cache, the window's
block is remembered as its companion. A cached prefix is then of use up to a point whose look-back still has all its
companions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from core.reach import Reach

NOTHING = 0  # stands in a table where a block was given back; never read


@dataclass
class WindowTable:
    """One request's blocks in one WindowPool, by position; set by the scheduler."""

    ids: list[int] = field(default_factory=list)
    first: int = 0  # entries before it were given back


class WindowPool:
    """Hands out blocks for one reach. It is sized so that it never runs out before the text's own pool does."""

    def __init__(self, reach: Reach, num_blocks: int, block_size: int) -> None:
        self.reach, self.num_blocks, self.block_size = reach, num_blocks, block_size
        self._refs = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # companions that nobody owns, least recently used first
        self._companion: dict[int, int] = {}  # text's cached block -> block here
        self._beside: dict[int, int] = {}  # the other way round

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._idle)

    # ------------------------------------------------------------------------------------------ a request's table

    def cover(self, table: WindowTable, start: int, end: int) -> None:
        """Give back what token `start` no longer sees, and make room for tokens up to `end`."""
        self.trim(table, start)
        while len(table.ids) * self.block_size < end:
            table.ids.append(self._take())

    def trim(self, table: WindowTable, position: int) -> None:
        """Give back the blocks that lie before everything that the token at `position` sees."""
        oldest = min(self.reach.oldest(position) // self.block_size, len(table.ids))
        while table.first < oldest:
            self._drop(table.ids[table.first])
            table.ids[table.first] = NOTHING
            table.first += 1

    def cut(self, table: WindowTable, end: int) -> None:
        """Give back the blocks that hold no token before `end`: drafts lay there."""
        while (len(table.ids) - 1) * self.block_size >= end:
            self._drop(table.ids.pop())

    def free(self, table: WindowTable) -> None:
        """Give back all of a table, the oldest first."""
        for block in table.ids[table.first :]:
            self._drop(block)
        table.ids, table.first = [], 0

    # ------------------------------------------------------------------------------------------ the prefix cache

    def usable(self, chain: Sequence[int]) -> int:
        """Return how many of the text's cached blocks can be taken over: the token after them must see companions."""
        run, best = 0, 0
        for count, block in enumerate(chain, 1):
            run = run + 1 if block in self._companion else 0
            if run >= count - self._first_of(count):
                best = count
        return best

    def adopt(self, chain: Sequence[int]) -> WindowTable:
        """Return a table for a request that starts with the text's blocks `chain`; usable(chain) == len(chain)."""
        first = self._first_of(len(chain))
        ids = [self._companion[block] for block in chain[first:]]
        for block in ids:
            self._share(block)
        return WindowTable([NOTHING] * first + ids, first)

    def register(self, table: WindowTable, index: int, text_block: int) -> None:
        """The text's block at `index` is cached now as `text_block`: keep this one beside it, or take its companion."""
        if index < table.first:
            return
        own, known = table.ids[index], self._companion.get(text_block)
        if known is None:
            self._companion[text_block], self._beside[own] = own, text_block
        elif known != own:
            self._share(known)
            self._drop(own)
            table.ids[index] = known

    def forget(self, text_blocks: Iterable[int]) -> None:
        """The text's blocks leave the prefix cache; their companions stay with their owners only."""
        for text_block in text_blocks:
            block = self._companion.pop(text_block, None)
            if block is None:
                continue
            del self._beside[block]
            if block in self._idle:
                del self._idle[block]
                self._blank.append(block)

    # ------------------------------------------------------------------------------------------ counts

    def _first_of(self, count: int) -> int:
        return min(self.reach.oldest(count * self.block_size) // self.block_size, count)

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            assert self._idle, f"the pool of {self.reach} is too small for the requests that were admitted"
            block, _ = self._idle.popitem(last=False)
            del self._companion[self._beside.pop(block)]
        self._refs[block] = 1
        return block

    def _share(self, block: int) -> None:
        if self._refs[block] == 0:
            del self._idle[block]
        self._refs[block] += 1

    def _drop(self, block: int) -> None:
        assert self._refs[block] > 0, f"block {block} has no owner"
        self._refs[block] -= 1
        if self._refs[block] == 0:
            if block in self._beside:
                self._idle[block] = None
            else:
                self._blank.append(block)

    def check(self, tables: Iterable[WindowTable]) -> None:
        """Assert that all books agree, given every owner's table. For tests."""
        refs = [0] * self.num_blocks
        for table in tables:
            assert all(block == NOTHING for block in table.ids[: table.first])
            for block in table.ids[table.first :]:
                refs[block] += 1
        assert refs == self._refs, "reference counts differ from owners"
        assert sorted([*self._blank, *self._idle]) == [block for block, count in enumerate(refs) if not count]
        assert all(block in self._beside for block in self._idle), "an idle block is no companion"
        assert not any(block in self._beside for block in self._blank), "a blank block is a companion"
        assert self._companion == {text: block for block, text in self._beside.items()}


def most_blocks(reach: Reach, block_size: int, max_requests: int, tokens_a_step: int) -> int:
    """Return how many blocks can ever be in use: what each request sees, and what a step adds to it."""
    seen = (reach.most - 1) // block_size + 2  # cut by block edges at both ends
    return max_requests * (seen + 1) + -(-tokens_a_step // block_size)
