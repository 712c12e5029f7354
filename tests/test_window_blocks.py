"""Blocks of layers that look back only so far: what lies behind is given back, and a cached prefix stays of use."""

import pytest

from core.blocks import BlockPool
from core.config import EngineConfig
from core.contracts import KVSpec
from core.device import HostDevice
from core.errors import ConfigError
from core.kv_memory import kv_bytes, size_memory
from core.reach import EVERYTHING, Reach
from core.request import Request
from core.sampling_params import SamplingParams
from core.scheduler import Scheduler, SchedulerLimits
from core.window_blocks import WindowPool, WindowTable, most_blocks

SIZE = 4


@pytest.mark.parametrize(
    ("reach", "position", "oldest"),
    [
        (Reach(window=5), 3, 0),
        (Reach(window=5), 4, 0),
        (Reach(window=5), 5, 1),
        (Reach(chunk=6), 5, 0),
        (Reach(chunk=6), 6, 6),
        (Reach(window=3, chunk=6), 7, 6),
        (Reach(window=3, chunk=6), 11, 9),
        (EVERYTHING, 900, 0),
    ],
)
def test_the_oldest_token_that_is_seen(reach, position, oldest):
    assert reach.oldest(position) == oldest


def test_a_table_gives_back_what_lies_behind_its_window():
    pool, table = WindowPool(Reach(window=5), 4, SIZE), WindowTable()
    for position in range(100):
        pool.cover(table, position, position + 1)
        assert len(table.ids) == position // SIZE + 1
        assert table.first == max(0, position - 4) // SIZE
        pool.check([table])
    pool.free(table)
    assert pool.num_free == 4


def test_the_companions_of_a_cached_prefix_are_found_and_shared():
    pool, table = WindowPool(Reach(window=5), 8, SIZE), WindowTable()
    pool.cover(table, 0, 12)
    for index, text_block in enumerate((20, 21, 22)):
        pool.register(table, index, text_block)
    blocks = list(table.ids)
    pool.free(table)
    assert pool.usable([20, 21, 22]) == 3
    other = pool.adopt([20, 21, 22])
    assert (other.first, other.ids[2:]) == (2, blocks[2:]), "token 12 sees 8 to 12, so the third block alone is taken"
    pool.check([other])


def test_a_prefix_is_of_use_up_to_a_point_that_still_has_all_it_looks_back_to():
    pool, table = WindowPool(Reach(window=6), 4, SIZE), WindowTable()
    for index, text_block in enumerate((20, 21, 22, 23)):
        pool.cover(table, index * SIZE, (index + 1) * SIZE)
        pool.register(table, index, text_block)
    pool.free(table)
    assert pool.usable([20, 21, 22, 23]) == 4
    pool.forget([23])
    assert pool.usable([20, 21, 22, 23]) == 3
    pool.forget([21])
    assert pool.usable([20, 21, 22, 23]) == 1, "token 12 sees 7 to 12, and the block of 4 to 7 is gone"


def test_companions_are_taken_for_new_texts_the_least_recently_used_first():
    pool, table = WindowPool(Reach(window=4), 3, SIZE), WindowTable()
    for index in range(3):
        pool.cover(table, index * SIZE, (index + 1) * SIZE)
        pool.register(table, index, 20 + index)
    pool.free(table)
    new = WindowTable()
    pool.cover(new, 0, 4)
    assert pool.usable([20]) == 0 and pool.usable([20, 21]) == 2
    pool.check([new])


def test_two_owners_of_equal_text_end_with_one_block():
    pool, one, other = WindowPool(Reach(window=9), 6, SIZE), WindowTable(), WindowTable()
    for table in (one, other):
        pool.cover(table, 0, 4)
        pool.register(table, 0, 20)
    assert one.ids == other.ids and pool.num_free == 5
    pool.check([one, other])


def test_the_pool_is_as_large_as_the_worst_mix_of_requests_needs():
    """Every request sits where its window is cut by block edges most, and one of them runs a whole step's tokens."""
    for window in range(1, 14):
        reach, requests, step = Reach(window=window), 3, 10
        pool = WindowPool(reach, most_blocks(reach, SIZE, requests, step), SIZE)
        for start in range(24, 24 + SIZE):
            tables = [WindowTable([0] * (start // SIZE), start // SIZE) for _ in range(requests)]
            for table in tables:
                table.first = reach.oldest(start) // SIZE
                table.ids = [0] * table.first
                pool.cover(table, start, start + 1)
            pool.cover(tables[0], start, start + step)
            for table in tables:
                pool.free(table)


def make_request(name, prompt, max_tokens=4):
    return Request(name, prompt, SamplingParams(), max_tokens)


def run(scheduler, request):
    scheduler.add(request)
    while not request.is_finished:
        entries = scheduler.schedule().entries
        scheduler.advance(entries, [[7] if entry.samples else [] for entry in entries])
        if len(request.output_ids) == request.max_tokens:
            scheduler.complete(request, None)


def test_a_second_request_takes_the_prefix_over_with_its_windows():
    limits = SchedulerLimits(4, 16, 400, 10)
    window = WindowPool(Reach(window=10), most_blocks(Reach(window=10), SIZE, 4, 16), SIZE)
    scheduler = Scheduler(BlockPool(100, SIZE), limits, [window])
    prompt = list(range(200))
    run(scheduler, make_request("cold", prompt))
    warm = make_request("warm", [*prompt, 300, 301])
    run(scheduler, warm)
    assert warm.num_cached == 200
    scheduler.pool.reset_prefix_cache()
    again = make_request("again", prompt)
    run(scheduler, again)
    assert again.num_cached == 0
    assert window.num_free == window.num_blocks


# ------------------------------------------------------------------------------------------------ sizes


class Half:
    itemsize = 2


def spec(reach):
    return KVSpec("layer", num_kv_heads=1, k_dim=8, v_dim=8, dtype=Half(), reach=reach)


FULL, WINDOW = spec(EVERYTHING), spec(Reach(window=32))
BLOCK_BYTES = 16 * 16 * 2


def sizes(specs, max_model_len=4096, **options):
    config = EngineConfig(block_size=16, max_num_seqs=4, **options)
    return size_memory(config, specs, max_model_len, tokens_a_step=64, memory=kv_bytes(config, HostDevice()))


def test_windowed_layers_leave_the_memory_to_the_others():
    most = most_blocks(Reach(window=32), 16, 4, 64)
    found = sizes([FULL, WINDOW, WINDOW, WINDOW], kv_cache_memory=BLOCK_BYTES * (3 * most + 500))
    assert found.num_blocks == 500
    assert found.by_layer([FULL, WINDOW]) == [500, most]


def test_a_model_of_windows_alone_is_bounded_by_its_requests():
    found = sizes([WINDOW], kv_cache_memory=BLOCK_BYTES * 30)
    assert found.num_blocks == 4 * 4096 // 16, "the text's blocks only count tokens"
    assert found.by_layer([WINDOW])[0] <= 30


def test_a_window_longer_than_every_text_shares_the_texts_blocks():
    found = sizes([FULL, spec(Reach(window=2048))], max_model_len=256)
    assert found.windows == {} and found.num_blocks == 4 * 256 // 16


def test_memory_for_less_than_a_block_is_an_error():
    with pytest.raises(ConfigError, match=r"does not hold one block of 16 tokens \(1024 bytes\)"):
        sizes([FULL, WINDOW], kv_cache_memory=1000)
