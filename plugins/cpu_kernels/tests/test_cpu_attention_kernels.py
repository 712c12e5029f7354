"""Attention in place gives what the plain reference gives, whatever is asked, stored, or left lying in the cache."""

import random
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.attention.torch_reference import TorchReferenceAttention
from core.batch import Batch, Places
from core.config import EngineConfig
from core.contracts import AttentionArgs, Bid, KVSpec, Refusal
from core.errors import CoreError, UnsupportedAttention
from core.reach import EVERYTHING, Reach

pytest.importorskip("core_cpu_kernels", reason="not installed where there is no C++ compiler")
import core_cpu_kernels
from core_cpu_kernels.attention import CpuKernelAttention
from core_cpu_kernels.library import instruction_sets

SETS = [name for name in instruction_sets() if name not in ("amx", "avx512vnni")]  # those have the code of avx512

BOUND = 1e-5  # relative, by norm, of float32
HALF_BOUND = {torch.float32: BOUND, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # answers are rounded to these
HEADS = 6
SLOPES, SINKS = torch.linspace(0.01, 1, HEADS), torch.linspace(-1, 2, HEADS)
ARGS = {
    "plain": {},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "wide window": {"window": 300},
    "chunk": {"chunk": 6},
    "window in chunk": {"window": 50, "chunk": 64},
    "softcap": {"softcap": 0.7},
    "wide softcap": {"softcap": 30.0},
    "sinks": {"sinks": SINKS},
    "bias": {"bias": SLOPES},
    "all": {"window": 70, "chunk": 200, "softcap": 1.5, "sinks": SINKS, "bias": SLOPES},
}
MIXES = {
    "decode at block edges": [(1, 1), (15, 1), (16, 1), (17, 1), (64, 1), (65, 1)],
    "long decode": [(256, 1), (257, 1), (800, 1)],
    "prefill": [(7, 7), (64, 64), (1, 1), (129, 129)],
    "chunks beside decode": [(300, 1), (130, 64), (3, 3), (600, 3), (257, 70), (16, 1)],
}


@pytest.fixture(params=SETS)
def backend(request):
    return CpuKernelAttention(request.param)


@dataclass
class Step:
    """A step of random requests whose earlier tokens are in the cache; `lens` = (context, new tokens) of each.

    Blocks stand in random order. Whatever no token was written to holds NaN, block 0 too, which belongs to nobody.
    """

    lens: list
    spec: KVSpec = KVSpec("layer", 2, 16, 16, torch.float32)  # noqa: RUF009  # frozen
    block_size: int = 16
    heads: int = HEADS
    dtype: torch.dtype = torch.float32  # of q, k and v
    seed: int = 0
    layer: int = 0
    tables: list = field(default_factory=list)

    def __post_init__(self):
        torch.manual_seed(self.seed)
        blocks = [-(-context // self.block_size) for context, _ in self.lens]
        ids = list(range(1, sum(blocks) + 1))
        random.Random(self.seed).shuffle(ids)
        self.tables = [[ids.pop() for _ in range(count)] for count in blocks]
        self.num_blocks = sum(blocks) + 2

        def made(heads, dim):
            return [torch.randn(context, heads, dim).to(self.dtype) for context, _ in self.lens]

        self.q, self.k = made(self.heads, self.spec.k_dim), made(self.spec.num_kv_heads, self.spec.k_dim)
        self.v = made(self.spec.num_kv_heads, self.spec.v_dim)

    def places(self, rows, ranges, tables):
        slots = [
            torch.tensor(self.tables[row])[torch.arange(*range_) // self.block_size] * self.block_size
            + torch.arange(*range_) % self.block_size
            for row, range_ in zip(rows, ranges, strict=True)
        ]
        flat, width = torch.cat(slots), max(map(len, tables))
        padded = torch.tensor([table + [0] * (width - len(table)) for table in tables])
        return Places(flat, padded, flat[flat % self.block_size == 0] // self.block_size)

    def batch(self, rows, ranges):
        """Blocks that the first of the new tokens no longer sees are given back: 0 stands in their place."""
        tables, starts = [], [0]
        for row, (start, end) in zip(rows, ranges, strict=True):
            gone = self.spec.reach.oldest(start) // self.block_size
            tables.append([0] * gone + self.tables[row][gone : -(-end // self.block_size)])
            starts.append(starts[-1] + end - start)
        everything = self.places(rows, ranges, tables)
        return Batch(
            scheduled=(),
            token_ids=torch.zeros(starts[-1], dtype=torch.int64),
            positions=torch.cat([torch.arange(*range_) for range_ in ranges]),
            everything=everything,
            query_starts=starts,
            context_lens=[end for _, end in ranges],
            logit_rows=torch.zeros(0, dtype=torch.int64),
            attention=None,
            windows={self.spec.reach: everything} if self.spec.reach.is_bounded else {},
        )

    def attend(self, backend, args, rows, ranges):
        backend.plan(self.batch(rows, ranges))
        parts = list(zip(rows, ranges, strict=True))
        q, k, v = (torch.cat([x[row][start:end] for row, (start, end) in parts]) for x in (self.q, self.k, self.v))
        return backend.attend(q, k, v, self.layer, args)

    def start(self, backend, args):
        """Poison the cache and run what came before this step."""
        backend.allocate([self.spec], [self.num_blocks], self.block_size)
        if isinstance(backend, CpuKernelAttention):
            backend.layers[0].cache.fill_(torch.nan)
        else:
            backend.cache.keys[0].fill_(torch.nan)
            backend.cache.values[0].fill_(torch.nan)
        self.attend_before(backend, args)

    def attend_before(self, backend, args):
        before = [(row, (0, context - new)) for row, (context, new) in enumerate(self.lens) if context > new]
        if before:
            self.attend(backend, args, [row for row, _ in before], [range_ for _, range_ in before])

    def run(self, backend, args):
        self.start(backend, args)
        return self.attend_last(backend, args)

    def attend_last(self, backend, args):
        return self.attend(backend, args, range(len(self.lens)), [(c - n, c) for c, n in self.lens])

    def check(self, backend, args):
        found, wanted = self.run(backend, args), self.run(TorchReferenceAttention(), args)
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert_near(found, wanted, HALF_BOUND[self.dtype])


def assert_near(found, wanted, bound=BOUND):
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < bound, f"relative error {error:.2e}"  # a NaN is not less


def test_layers_of_unlike_widths_keep_k_and_v_beside_each_other(backend):
    specs = [
        KVSpec("wide", 2, 16, 16, torch.float32),
        KVSpec("odd", 1, 5, 7, torch.float32),
        KVSpec("half", 3, 8, 8, torch.bfloat16),
        KVSpec("last", 2, 8, 24, torch.float32),
    ]
    steps = [Step(MIXES["chunks beside decode"], spec, layer=layer, seed=3) for layer, spec in enumerate(specs)]
    args = [AttentionArgs(spec.k_dim**-0.5) for spec in specs]
    backend.allocate(specs, [steps[0].num_blocks] * len(specs), steps[0].block_size)
    for layer in backend.layers:
        layer.cache.fill_(torch.nan)
    for step, one in zip(steps, args, strict=True):
        step.attend_before(backend, one)
    for step, one in zip(steps, args, strict=True):
        wanted = replace(step, layer=0).run(TorchReferenceAttention(), one)
        assert_near(step.attend_last(backend, one), wanted, BOUND)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", ARGS)
def test_attention_is_the_reference_s_whatever_is_asked(backend, name, mix):
    for dims in [(2, 16, 16), (6, 10, 7)]:
        step = Step(MIXES[mix], KVSpec("layer", *dims, torch.float32))
        assert_near(step.run(backend, AttentionArgs(0.4, **ARGS[name])), reference(mix, name, dims))


@cache
def reference(mix, name, dims):
    """The same for every instruction set."""
    step = Step(MIXES[mix], KVSpec("layer", *dims, torch.float32))
    return step.run(TorchReferenceAttention(), AttentionArgs(0.4, **ARGS[name]))


@pytest.mark.parametrize(
    ("block_size", "dims"),
    [(1, (1, 8, 8)), (4, (3, 64, 64)), (5, (2, 80, 72)), (16, (2, 1, 130)), (16, (1, 576, 512)), (32, (6, 6, 4)),
     (100, (2, 80, 72)), (272, (3, 64, 64))],
    ids=str,
)  # fmt: skip
def test_blocks_and_heads_may_be_of_any_size(backend, dims, block_size):
    step = Step(MIXES["chunks beside decode"], KVSpec("layer", *dims, torch.float32), block_size)
    step.check(backend, AttentionArgs(dims[1] ** -0.5, **ARGS["all"]))


@pytest.mark.parametrize("heads", [1, 5, 7, 8, 71])
def test_any_number_of_heads_may_share_one_of_the_cache(backend, heads):
    step = Step(MIXES["chunks beside decode"], KVSpec("layer", 1, 16, 16, torch.float32), heads=heads)
    step.check(backend, AttentionArgs(0.25))


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_and_cache_may_be_of_two_bytes(backend, dtype, cache):
    """The reference reads the same rounded keys and values, so that only the answer's own rounding is left."""
    step = Step(MIXES["chunks beside decode"], KVSpec("layer", 2, 40, 24, cache), dtype=dtype)
    step.check(backend, AttentionArgs(0.2, **ARGS["all"]))


@pytest.mark.parametrize("reach", [Reach(window=20), Reach(chunk=64), Reach(window=40, chunk=64)], ids=str)
def test_blocks_that_were_given_back_are_not_read(backend, reach):
    spec = KVSpec("layer", 2, 16, 16, torch.float32, reach=reach)
    lens = [(300, 1), (64, 1), (65, 1), (200, 70), (90, 90), (129, 2)]
    Step(lens, spec).check(backend, AttentionArgs(0.3, window=reach.window, chunk=reach.chunk))


def test_large_scores_neither_overflow_nor_lose_the_rest(backend):
    step = Step(MIXES["chunks beside decode"])
    step.q = [q * 300 for q in step.q]
    step.check(backend, AttentionArgs(1.0))


def test_scores_far_below_zero_still_make_a_mean(backend):
    step = Step([(40, 1), (300, 1), (20, 20)])
    step.k = [torch.ones_like(k) for k in step.k]
    step.q = [-100 * torch.ones_like(q) for q in step.q]
    step.check(backend, AttentionArgs(1.0, sinks=torch.full((HEADS,), -1600.0)))


def test_a_nan_of_the_request_s_own_is_not_hidden(backend):
    step = Step([(40, 1), (30, 1)])
    step.k[0][3] = torch.nan
    found = step.run(backend, AttentionArgs(0.3))
    assert found[0].isnan().all() and not found[1].isnan().any()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_attention_is_the_reference_s_for_random_steps(data):
    lens = data.draw(
        st.lists(
            st.integers(1, 400).flatmap(lambda context: st.tuples(st.just(context), st.integers(1, min(context, 80)))),
            min_size=1,
            max_size=5,
        )
    )
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    spec = KVSpec(
        "layer",
        kv_heads,
        data.draw(st.integers(1, 70)),
        data.draw(st.integers(1, 70)),
        data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    )
    maybe = st.none() | st.integers(1, 100)
    args = AttentionArgs(
        data.draw(st.sampled_from([0.05, 0.3, 1.0])),
        window=data.draw(maybe),
        chunk=data.draw(maybe),
        softcap=data.draw(st.none() | st.sampled_from([0.5, 5.0, 50.0])),
        sinks=data.draw(st.none() | st.just(torch.linspace(-2, 3, kv_heads * group))),
        bias=data.draw(st.none() | st.just(torch.linspace(0, 0.5, kv_heads * group))),
    )
    bounded = Reach(args.window, args.chunk) if data.draw(st.booleans()) else EVERYTHING
    step = Step(lens, replace(spec, reach=bounded), data.draw(st.integers(1, 40)), kv_heads * group)
    step.check(CpuKernelAttention(data.draw(st.sampled_from(SETS))), args)


def test_parts_of_a_merged_projection_are_read_where_they_lie(backend):
    step = Step([(9, 9), (1, 1)], KVSpec("layer", 2, 16, 16, torch.float32))
    args = AttentionArgs(0.25)
    rows, ranges = range(2), [(0, 9), (0, 1)]
    step.start(backend, args)
    backend.plan(step.batch(rows, ranges))
    merged = torch.randn(10, (HEADS + 4) * 16).view(10, HEADS + 4, 16)
    q, k, v = merged.split([HEADS, 2, 2], 1)
    dense = [x.contiguous() for x in (q, k, v)]
    wanted = backend.attend(*dense, 0, args)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in dense]
    columns_apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in dense]
    for tensors in ((q, k, v), heads_first, columns_apart, dense):
        assert torch.equal(backend.attend(*tensors, 0, args), wanted)


def test_what_a_request_gets_does_not_depend_on_who_runs_beside_it_or_on_threads(backend):
    lens = [(700, 1), (33, 1), (300, 1), (130, 64)]
    args, before = AttentionArgs(0.3), torch.get_num_threads()
    together = Step(lens).run(backend, args)
    try:
        torch.set_num_threads(1)
        assert torch.equal(Step(lens).run(backend, args), together)
    finally:
        torch.set_num_threads(before)
    step, starts = Step(lens), [0, 1, 2, 3, 67]
    step.start(backend, args)
    for row, (context, new) in enumerate(lens):
        alone = step.attend(backend, args, [row], [(context - new, context)])
        assert torch.equal(alone, together[starts[row] : starts[row + 1]])


def test_arguments_may_change_from_call_to_call(backend):
    step = Step([(40, 1), (20, 5)])
    for name in ("plain", "window", "sinks", "plain"):
        step.check(backend, AttentionArgs(0.4, **ARGS[name]))
    args = AttentionArgs(0.4)
    wanted = step.run(backend, args)
    rows, ranges = range(2), [(39, 40), (15, 20)]
    step.attend(backend, AttentionArgs(0.1, softcap=1.0), rows, ranges)
    assert torch.equal(step.attend(backend, args, rows, ranges), wanted)


# ------------------------------------------------------------------------------------------ what it refuses


def refused(step, args, match, error=UnsupportedAttention):
    with pytest.raises(error, match=match):
        step.run(CpuKernelAttention(), args)


def test_attention_to_the_future_is_refused_by_name():
    refused(Step([(3, 3)]), AttentionArgs(1.0, causal=False), "not_causal, which layer layer asks")


def test_doubles_are_refused_in_queries_and_in_the_cache():
    refused(Step([(3, 3)], dtype=torch.float64), AttentionArgs(1.0), "q in torch.float64")
    spec = KVSpec("model.layers.7", 2, 16, 16, torch.float64)
    with pytest.raises(UnsupportedAttention, match=r"Layer model\.layers\.7 keeps K and V in torch.float64"):
        CpuKernelAttention().allocate([spec], [4], 16)


def test_sinks_for_other_heads_are_refused():
    refused(Step([(3, 3)]), AttentionArgs(1.0, sinks=torch.zeros(3)), "3 sinks or slopes for 6 heads")


def test_tokens_that_are_not_the_step_s_are_refused():
    step, backend = Step([(3, 3)]), CpuKernelAttention()
    step.start(backend, AttentionArgs(1.0))
    backend.plan(step.batch([0], [(0, 3)]))
    q, k = torch.zeros(2, HEADS, 16), torch.zeros(2, 2, 16)
    with pytest.raises(CoreError, match="2 tokens of a step of 3"):
        backend.attend(q, k, k, 0, AttentionArgs(1.0))


@pytest.mark.parametrize("block", [-1, 1000])
def test_a_block_that_there_is_not_is_an_error_and_no_crash(block):
    step = Step([(40, 1)])
    step.start(backend := CpuKernelAttention(), AttentionArgs(1.0))
    step.tables[0][0] = block
    with pytest.raises(CoreError, match="blocks that layer layer does not have"):
        step.attend(backend, AttentionArgs(1.0), [0], [(39, 40)])


def test_it_bids_above_the_core_on_the_cpu_and_refuses_elsewhere():
    bid = core_cpu_kernels.resolve_attention_backend(spec=None, options=EngineConfig(device="cpu"))
    assert isinstance(bid, Bid) and bid.name == bid.build().name == "cpu_kernels" and bid.priority > 60
    refusal = core_cpu_kernels.resolve_attention_backend(spec=None, options=EngineConfig(device="cuda"))
    assert isinstance(refusal, Refusal) and "'cuda'" in refusal.reason
