"""The block pool: ownership, and a prefix cache that never gives a block with other content."""

from __future__ import annotations

import pytest

from core.blocks import BlockPool

SIZE = 4


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Allocate blocks for `tokens` and register the full ones, as a request does that computes them all."""
    blocks = pool.allocate(pool.blocks_for(len(tokens)))
    assert blocks is not None
    for index in range(len(tokens) // SIZE):
        parent = blocks[index - 1] if index else None
        blocks[index] = pool.register(blocks[index], parent, tokens[index * SIZE : (index + 1) * SIZE])
    return blocks


def test_allocate_gives_distinct_blocks_and_counts_them() -> None:
    pool = BlockPool(5, SIZE)
    first, second = pool.allocate(2), pool.allocate(3)
    assert first is not None and second is not None
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert (pool.num_free, pool.num_used, pool.num_blocks) == (0, 5, 5)
    pool.check([first, second])


def test_allocate_is_all_or_nothing() -> None:
    pool = BlockPool(3, SIZE)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert pool.allocate(0) == []


def test_a_shared_block_is_free_only_when_its_last_owner_frees_it() -> None:
    pool = BlockPool(2, SIZE)
    blocks = fill(pool, list(range(4)))
    pool.share(blocks)
    pool.free(blocks)
    assert pool.num_used == 1
    pool.check([blocks])
    pool.free(blocks)
    assert pool.num_used == 0
    pool.check([])


def test_freeing_a_block_twice_is_caught() -> None:
    pool = BlockPool(2, SIZE)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.free(blocks)
    with pytest.raises(AssertionError, match="has no owner"):
        pool.free(blocks)


def test_match_gives_the_longest_chain_of_full_blocks() -> None:
    pool = BlockPool(8, SIZE)
    blocks = fill(pool, list(range(10)))
    assert pool.match(list(range(10)), 10) == blocks[:2]
    assert pool.match([*range(8), 99, 99, 99, 99], 12) == blocks[:2]
    assert pool.match([0, 1, 2, 3, 99, 5, 6, 7], 8) == blocks[:1]
    assert pool.match([99, 1, 2, 3], 4) == []
    assert pool.match([0, 1, 2], 3) == []


def test_match_gives_no_more_than_max_tokens() -> None:
    pool = BlockPool(8, SIZE)
    blocks = fill(pool, list(range(8)))
    assert pool.match(list(range(8)), 7) == blocks[:1]
    assert pool.match(list(range(8)), 3) == []


def test_equal_blocks_under_different_parents_are_different() -> None:
    pool = BlockPool(8, SIZE)
    left, right = fill(pool, [1] * 4 + [7] * 4), fill(pool, [2] * 4 + [7] * 4)
    assert left[1] != right[1]
    assert pool.match([1] * 4 + [7] * 4, 8) == left
    assert pool.match([2] * 4 + [7] * 4, 8) == right
    assert pool.match([7] * 4, 4) == []


def test_tokens_whose_hashes_collide_do_not_match() -> None:
    pool = BlockPool(8, SIZE)
    assert hash((-1, -1, -1, -1)) == hash((-2, -2, -2, -2))
    blocks = fill(pool, [-1] * 4)
    assert pool.match([-2] * 4, 4) == []
    assert pool.match([-1] * 4, 4) == blocks


def test_a_freed_block_is_found_until_it_is_reused() -> None:
    pool = BlockPool(2, SIZE)
    blocks = fill(pool, list(range(4)))
    pool.free(blocks)
    assert pool.num_free == 2
    assert pool.match(list(range(4)), 4) == blocks
    taken = pool.allocate(2)
    assert taken is not None
    assert pool.match(list(range(4)), 4) == []
    pool.check([taken])


def test_blank_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(4, SIZE)
    blocks = fill(pool, list(range(4)))
    pool.free(blocks)
    taken = pool.allocate(3)
    assert taken is not None and blocks[0] not in taken
    assert pool.match(list(range(4)), 4) == blocks


def test_the_least_recently_used_block_is_reused_first() -> None:
    pool = BlockPool(3, SIZE)
    prompts = [[token] * 4 for token in range(3)]
    chains = [fill(pool, prompt) for prompt in prompts]
    for chain in chains:
        pool.free(chain)
    pool.share(chains[0])  # used again: now the most recent
    pool.free(chains[0])
    pool.allocate(1)
    assert [bool(pool.match(prompt, 4)) for prompt in prompts] == [True, False, True]
    pool.allocate(1)
    assert [bool(pool.match(prompt, 4)) for prompt in prompts] == [True, False, False]


def test_the_deepest_block_of_a_chain_is_reused_before_its_parent() -> None:
    pool = BlockPool(3, SIZE)
    blocks = fill(pool, list(range(12)))
    pool.free(blocks)
    pool.check([])
    for left in (2, 1, 0):
        assert pool.allocate(1) == [blocks[left]]
        assert pool.match(list(range(12)), 12) == blocks[:left]


def test_the_first_of_two_equal_blocks_stays_and_the_second_owner_moves_to_it() -> None:
    pool = BlockPool(6, SIZE)
    first, second = fill(pool, list(range(8))), fill(pool, [*range(8), 42])
    assert second[:2] == first
    assert pool.num_used == 3
    pool.check([first, second])
    pool.free(first)
    assert pool.match(list(range(8)), 8) == first
    pool.check([second])


def test_an_owner_moves_to_an_equal_block_that_nobody_owned_any_more() -> None:
    pool = BlockPool(4, SIZE)
    first = fill(pool, list(range(4)))
    pool.free(first)
    second = fill(pool, list(range(4)))
    assert second == first
    pool.check([second])


def test_after_a_reset_nothing_is_found_and_nothing_is_lost() -> None:
    pool = BlockPool(6, SIZE)
    idle, used = fill(pool, [1] * 8), fill(pool, [2] * 4 + [3] * 2)
    pool.free(idle)
    pool.reset_prefix_cache()
    assert pool.match([1] * 8, 8) == pool.match([2] * 4, 4) == []
    assert pool.num_cached == 0
    pool.check([used])
    assert pool.register(used[1], used[0], [3] * 4) == used[1]
    assert pool.num_cached == 0, "a block under a forgotten parent could never be found"
    pool.free(used)
    assert pool.num_free == 6
    pool.check([])


def test_a_request_that_goes_on_after_a_reset_does_not_lend_its_old_chain_to_others() -> None:
    pool = BlockPool(6, SIZE)
    old = pool.allocate(2)
    assert old is not None
    pool.register(old[0], None, [1] * 4)
    pool.reset_prefix_cache()
    new = fill(pool, [1] * 4)
    pool.register(old[1], old[0], [2] * 4)
    assert pool.match([1] * 4 + [2] * 4, 8) == new
    pool.check([old, new])
