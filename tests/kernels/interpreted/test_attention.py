"""Paged attention, decode and prefill, gives the dense formula over a cache whose unused slots hold NaN."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paged_case import PagedCase, make_args

from core.kernels.attention_call import Tile

MIXES = {
    "decode": [(1, 1), (4, 1), (17, 1), (40, 1)],
    "prefill": [(7, 7), (1, 1), (16, 16)],
    "chunks beside decode": [(9, 1), (24, 9), (5, 0), (33, 1), (13, 8)],
}
SHAPES = {  # kv_heads, group, k_dim, v_dim
    "one head": (1, 1, 16, 16),
    "grouped": (2, 3, 32, 32),
    "all share one K/V head": (1, 20, 16, 16),  # more heads than rows of a tile
    "MLA, expanded": (2, 1, 24, 16),
    "MLA, absorbed": (1, 4, 576, 512),
    "80": (1, 2, 80, 80),
    "tiny": (2, 2, 6, 10),
}
ARGS = ["plain", "window", "window of one", "chunk", "softcap", "sinks", "alibi", "table", "window+softcap+sinks+alibi"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", ARGS)
def test_attention_gives_the_dense_formula(name, device):
    case = PagedCase(MIXES["chunks beside decode"], device=device)
    case.check(make_args(name, case.heads, device))


@pytest.mark.parametrize("shape", SHAPES)
def test_heads_may_be_grouped_and_widths_need_not_be_powers_of_two(shape, device):
    kv_heads, group, k_dim, v_dim = SHAPES[shape]
    case = PagedCase([(19, 1), (9, 6)], kv_heads, group, k_dim, v_dim, device=device)
    case.check(make_args("sinks", case.heads, device, scaling=k_dim**-0.5))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_types_are_as_near_as_they_can_be(dtype, device):
    case = PagedCase(MIXES["chunks beside decode"], dtype=dtype, device=device)
    case.check(make_args("wide window", case.heads, device))


def test_the_cache_may_keep_heads_before_slots(device):
    case = PagedCase([(9, 1), (12, 5)], heads_first=True, device=device)
    case.check(make_args("plain", case.heads, device))


@pytest.mark.parametrize("context", [1, 3, 4, 5, 15, 16, 17, 31, 32, 33])
def test_contexts_may_end_at_and_around_the_edges_of_blocks_tiles_and_splits(context, device):
    case = PagedCase([(context, 1), (context, min(context, 3))], kv_heads=1, device=device)
    case.check(make_args("plain", case.heads, device))


def test_a_request_does_not_depend_on_the_others_of_its_batch(device):
    args = make_args("sinks", 4, device)
    short = PagedCase([(11, 1), (9, 6)], device=device)
    both = PagedCase([(75, 1), (11, 1), (30, 30), (9, 6)], device=device)
    for name in ("q", "k", "v"):
        kept = getattr(short, name)
        getattr(both, name)[1], getattr(both, name)[3] = kept[0], kept[1]
    alone, beside = short.run(args), both.run(args)
    assert torch.equal(alone, torch.cat([beside[1:2], beside[-6:]]))


def test_padding_with_an_empty_context_gives_zeros(device):
    from core.kernels.attention_call import PagedCall
    from core.kernels.paged_decode import paged_decode

    case = PagedCase([(5, 1), (5, 1)], device=device)
    args = make_args("plain", case.heads, device)
    wanted = case.run(args)
    out = torch.full_like(wanted, torch.nan)
    ints = torch.tensor([0, 1, 2, 5, 0, 0, 1], dtype=torch.int32, device=device)
    call = PagedCall(case.keys, case.values, case.tables.to(device), ints[:3], ints[3:5], case.tile)
    paged_decode(torch.cat(case.q), out, call, ints[5:], 3, args, split=16)
    torch.testing.assert_close(out[0], wanted[0])
    assert (out[1] == 0).all()


def test_large_scores_do_not_overflow(device):
    case = PagedCase([(40, 1), (20, 6)], device=device)
    case.check(make_args("plain", case.heads, device, scaling=300.0))


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_step_gives_the_dense_formula(data, device):
    def pick(low, high):
        return data.draw(st.integers(low, high))

    contexts = [pick(1, 50) for _ in range(pick(1, 4))]
    case = PagedCase(
        [(context, pick(0, min(context, 20))) for context in contexts] + [(3, 1)],
        kv_heads=pick(1, 2),
        group=pick(1, 5),
        k_dim=pick(1, 70),
        v_dim=pick(1, 40),
        block_size=pick(1, 9),
        device=device,
        tile=Tile(16, data.draw(st.sampled_from([16, 32])), 4, 1),
        split=32,
    )
    case.check(make_args(data.draw(st.sampled_from(ARGS)), case.heads, device))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ARGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mix", MIXES)
def test_the_whole_grid(mix, shape, name, dtype, device):
    kv_heads, group, k_dim, v_dim = SHAPES[shape]
    case = PagedCase(MIXES[mix], kv_heads, group, k_dim, v_dim, dtype=dtype, device=device)
    case.check(make_args(name, case.heads, device, scaling=k_dim**-0.5))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_many_steps_give_the_dense_formula(data, device):
    test_any_step_gives_the_dense_formula.hypothesis.inner_test(data, device)
