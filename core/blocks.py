"""BlockPool: which KV blocks are free, who owns the others, and what the cached ones hold. Plain Python, no torch.

Knows block ids and token ids only: the K/V itself lies with the attention backend.

    a block is      refs   in the prefix cache   where it is listed
    blank           0      no                    _blank, taken first
    idle            0      yes                   _idle, least recently used first; taken when nothing is blank
    in use          >= 1   full and computed     in its owners' block_ids
    being filled    1      no                    in its owner's block_ids

The prefix cache is a tree: a node is a full block under its parent node. A lookup compares the parent's id and every
token, so two prompts share a block only if they are equal up to its end. Who owns a node owns its ancestors, and frees
the deepest first; so an idle node is always taken before its parent, and no node is ever unreachable.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

ROOT = 0  # the node above every first block

Key = tuple[int, tuple[int, ...]]  # (id of the parent node, the block's tokens)


class BlockPool:
    """Hands out blocks by reference count. A freed block keeps its content until the block is taken again."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size  # tokens
        self._refs = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack: the last one is taken first
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._cached: dict[Key, int] = {}  # -> block
        self._key_of: dict[int, Key] = {}  # block -> its key; cached blocks only
        self._node_of: dict[int, int] = {}  # block -> its node's id, never used twice; cached blocks only
        self._last_node = ROOT
        self.on_uncached: Callable[[Iterable[int]], None] = lambda blocks: None  # called as blocks leave the cache

    @property
    def num_free(self) -> int:
        """Blocks that allocate() can give: blank ones, and cached ones that nobody owns."""
        return len(self._blank) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Blocks in the prefix cache, in use or idle."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """Return `count` blocks with one reference each, or None (and take nothing) if fewer are free."""
        if count > self.num_free:
            return None
        return [self._take() for _ in range(count)]

    def share(self, block_ids: Iterable[int]) -> None:
        """Add an owner to each block; the blocks are in use already, or came from match()."""
        for block in block_ids:
            if self._refs[block] == 0:
                del self._idle[block]
            self._refs[block] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Take one owner off each block of a request, given in order of position. Cached blocks become idle."""
        for block in reversed(block_ids):
            assert self._refs[block] > 0, f"block {block} has no owner"
            self._refs[block] -= 1
            if self._refs[block] > 0:
                continue
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._blank.append(block)

    def match(self, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Return the longest chain of cached blocks that holds the start of `token_ids`, at most `max_tokens` of them.

        Takes no reference: share() the blocks before anything is allocated.
        """
        size, parent, chain = self.block_size, ROOT, []
        for end in range(size, min(max_tokens, len(token_ids)) + 1, size):
            block = self._cached.get((parent, tuple(token_ids[end - size : end])))
            if block is None:
                break
            chain.append(block)
            parent = self._node_of[block]
        return chain

    def register(self, block: int, parent: int | None, token_ids: Sequence[int]) -> int:
        """Enter a block that is now full and computed; return the block that its owner uses from now on.

        `parent` is the owner's block before it, None for its first. If an equal block is cached already, that one
        stays: the owner's reference moves to it and `block` is freed. After a reset the parent may be unknown; then
        nothing is entered.
        """
        assert len(token_ids) == self.block_size and self._refs[block] > 0 and block not in self._key_of
        above = ROOT if parent is None else self._node_of.get(parent)
        if above is None:
            return block
        key = (above, tuple(token_ids))
        twin = self._cached.get(key)
        if twin is None:
            self._enter(block, key)
            return block
        self.share([twin])
        self.free([block])
        return twin

    def is_cached(self, block: int) -> bool:
        """True if others can find this block's content."""
        return block in self._key_of

    def reset_prefix_cache(self) -> None:
        """Forget all cached content. Blocks in use stay with their owners, but nobody else finds them any more."""
        self.on_uncached(list(self._key_of))
        self._cached.clear()
        self._key_of.clear()
        self._node_of.clear()
        self._blank.extend(self._idle)
        self._idle.clear()

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._cached[self._key_of.pop(block)]
            del self._node_of[block]
            self.on_uncached((block,))
        self._refs[block] = 1
        return block

    def _enter(self, block: int, key: Key) -> None:
        self._last_node += 1
        self._cached[key] = block
        self._key_of[block] = key
        self._node_of[block] = self._last_node

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Assert that all books agree, given every owner's block_ids. For tests: its cost grows with the pool."""
        refs = Counter(block for block_ids in owners for block in block_ids)
        assert self._refs == [refs[block] for block in range(self.num_blocks)], "reference counts differ from owners"
        listed = sorted([*self._blank, *self._idle])
        assert listed == [block for block in range(self.num_blocks) if not refs[block]], "free lists differ from refs"
        assert not any(block in self._key_of for block in self._blank), "a blank block is cached"
        assert all(block in self._key_of for block in self._idle), "an idle block is not cached"
        assert self._cached == {key: block for block, key in self._key_of.items()}, "two books of the cache differ"
        self._check_tree()

    def _check_tree(self) -> None:
        block_of = {node: block for block, node in self._node_of.items()}
        age = {block: index for index, block in enumerate(self._idle)}
        for block, (above, _) in self._key_of.items():
            if above == ROOT:
                continue
            assert above in block_of, f"block {block} is cached under a node that is gone"
            parent = block_of[above]
            assert self._refs[parent] >= self._refs[block], f"block {block} has an owner who does not own its parent"
            assert parent not in age or age[block] < age[parent], f"block {parent} would be taken before its child"
