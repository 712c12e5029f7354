"""What a GPU is asked for, without one: K/V memory by what is free, inputs in one copy, which steps are captured."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.batch import Batch, Places
from core.config import EngineConfig
from core.decode_graphs import NO_SLOT, Size, Sizes, padded
from core.device import CudaDevice, HostDevice
from core.engine_build import choose_dtype, sized
from core.errors import ConfigError
from core.kv_memory import HOST_BYTES, kv_bytes
from core.reach import Reach
from core.spec import ModelSpec
from core.staging import Layout, tensors_of, to_device, with_tensors

GIB = 1024**3


class Card(HostDevice):
    """80 GiB, of which so many are free."""

    stages = True

    def __init__(self, free):
        super().__init__()
        self.free, self.copies = free, 0

    def memory(self):
        return self.free, 80 * GIB

    def copy(self, source, target):
        self.copies += 1
        super().copy(source, target)


# ------------------------------------------------------------------------------------------------ memory


def test_kv_takes_what_the_fraction_leaves_beside_the_weights():
    config = EngineConfig(mem_fraction_static=0.75)
    assert kv_bytes(config, Card(free=64 * GIB)) == 44 * GIB  # 60 for both, 16 are taken
    assert kv_bytes(EngineConfig(), Card(free=64 * GIB)) == 64 * GIB - round(80 * GIB * 0.12)


def test_what_was_asked_for_in_bytes_is_taken_on_any_device():
    config = EngineConfig(kv_cache_memory=GIB)
    assert kv_bytes(config, Card(free=64 * GIB)) == kv_bytes(config, HostDevice()) == GIB
    assert kv_bytes(EngineConfig(), HostDevice()) == HOST_BYTES


def test_weights_that_leave_no_room_are_an_error_with_the_sizes():
    with pytest.raises(ConfigError, match=r"64424509440 of the device's 85899345920 bytes are taken.* 0.5 leaves none"):
        kv_bytes(EngineConfig(mem_fraction_static=0.5), Card(free=20 * GIB))


def test_a_fraction_is_refused_where_it_means_nothing():
    with pytest.raises(ConfigError, match="is for GPUs"):
        kv_bytes(EngineConfig(mem_fraction_static=0.5), HostDevice())
    with pytest.raises(ConfigError, match="give one of them"):
        EngineConfig(mem_fraction_static=0.5, kv_cache_memory=GIB)
    with pytest.raises(ConfigError, match=r"between 0 and 1, got 1\.5"):
        EngineConfig(mem_fraction_static=1.5)


@pytest.mark.parametrize(
    ("stored", "served"),
    [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.bfloat16), (None, torch.bfloat16)],
)
def test_a_gpu_computes_in_half_types(stored, served):
    spec = ModelSpec(Path("tiny"), "hf", {"model_type": "llama", "dtype": stored})
    assert choose_dtype("auto", spec, torch.device("cuda")) is served
    assert choose_dtype("auto", spec, torch.device("cpu")) is torch.float32
    assert choose_dtype("float32", spec, torch.device("cuda")) is torch.float32


def test_a_step_is_as_large_as_the_device_likes_where_nothing_is_said():
    small = sized(EngineConfig(device="cpu"))
    assert (small.max_num_seqs, small.max_num_batched_tokens) == (64, 512)
    asked = sized(EngineConfig(device="cpu", max_num_seqs=3, max_num_batched_tokens=99))
    assert (asked.max_num_seqs, asked.max_num_batched_tokens) == (3, 99)


def test_a_step_on_a_gpu_is_larger(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = sized(EngineConfig())
    assert (found.max_num_seqs, found.max_num_batched_tokens) == (256, 4096)


# ------------------------------------------------------------------------------------------------ staging


def test_tensors_of_any_dtype_travel_in_one_copy():
    card = Card(0)
    sent = [torch.arange(3), torch.tensor([7, 8], dtype=torch.int32), torch.rand(2, 5), torch.tensor([])]
    found = to_device(sent, card)
    assert card.copies == 1
    for one, other in zip(sent, found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        assert other.data_ptr() != one.data_ptr() or not len(one)
        assert other.storage_offset() * other.element_size() % 16 == 0


def test_a_tensor_of_another_shape_does_not_go_into_a_graphs_buffer():
    with pytest.raises(ValueError, match="does not fit"):
        Layout.like([torch.zeros(4)]).pack([torch.zeros(3)], Card(0))


# ------------------------------------------------------------------------------------------------ which steps


def batch(*context_lens, counts=None, rows=None, width=4):
    counts = counts or [1] * len(context_lens)
    starts = [sum(counts[:index]) for index in range(len(counts) + 1)]
    tokens = torch.arange(starts[-1]) + 3
    places = Places(tokens + 100, torch.full((len(counts), width), 9), fresh=torch.tensor([2]))
    return Batch(
        scheduled=(),
        token_ids=tokens,
        positions=tokens,
        everything=places,
        query_starts=starts,
        context_lens=list(context_lens),
        logit_rows=torch.arange(len(counts) if rows is None else rows),
        attention=None,
        windows={Reach(window=8): places},
    )


SIZES = Sizes(most_requests=6, most_keys=5000, block_size=16)


def test_requests_and_contexts_are_rounded_up():
    assert SIZES.of(batch(7)) == Size(1, 1024)
    assert SIZES.of(batch(7, 1024, 3)) == Size(4, 1024)
    assert SIZES.of(batch(*[7] * 5, 1025)) == Size(8, 2048)
    assert SIZES.of(batch(4097)) == Size(1, 8192)
    assert SIZES.blocks(Size(1, 1024)) == 64
    assert SIZES.blocks(Size(1, 8192)) == 313  # no text is longer than the model's 5000 tokens


@pytest.mark.parametrize(
    "step",
    [batch(9, 9, counts=[1, 4]), batch(9, 9, rows=1), batch(*[9] * 7), batch(5001)],
    ids=["a chunk beside it", "a row that does not sample", "too many requests", "too long a context"],
)
def test_other_steps_run_plainly(step):
    assert SIZES.of(step) is None


def test_requests_that_are_too_few_write_nothing_and_read_nothing():
    filled = padded(batch(7, 9, 5), Size(4, 1024), blocks=6)
    assert filled.context_lens == [7, 9, 5, 0]
    assert filled.query_starts == [0, 1, 2, 3, 4]
    for places in (filled.everything, *filled.windows.values()):
        assert places.slots.tolist() == [103, 104, 105, NO_SLOT]
        assert places.block_tables.tolist() == [[9, 9, 9, 9, 0, 0]] * 3 + [[0] * 6]
        assert places.fresh is None
    assert [len(filled.token_ids), len(filled.positions), len(filled.logit_rows)] == [4, 4, 4]


def test_all_steps_of_one_size_have_the_same_shapes():
    layouts = {
        Layout.like(tensors_of(padded(step, Size(4, 1024), 64)))
        for step in (batch(7, 9, 5), batch(1000, 2, 3, 4, width=63))
    }
    assert len(layouts) == 1


def test_a_batch_gets_back_as_many_tensors_as_it_gave():
    step = batch(7, 9)
    for one in (step, replace(step, windows={})):
        moved = with_tensors(one, iter([tensor + 1 for tensor in tensors_of(one)]))
        pairs = zip(tensors_of(one), tensors_of(moved), strict=True)
        assert all(torch.equal(before + 1, after) for before, after in pairs)


# ------------------------------------------------------------------------------------------------ torch.cuda, played


class PlayedCuda:
    """Stands for torch.cuda and writes down what is asked of it."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.asked.append(name)
            return Played(self, name)

        return call


class Played:
    """What a call gave: a stream, a graph, a context."""

    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def __enter__(self):
        self.cuda.asked.append(f"in {self.name}")

    def __exit__(self, *_):
        self.cuda.asked.append(f"out of {self.name}")

    def wait_stream(self, other):
        self.cuda.asked.append(f"{self.name} waits for {other.name}")

    def replay(self):
        self.cuda.asked.append("replay")


def test_a_capture_runs_beside_the_graph_then_without_waiting_then_inside_it(monkeypatch):
    cuda = PlayedCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    graph = CudaDevice(torch.device("cuda:1")).capture(lambda: cuda.asked.append("run") or torch.ones(2))
    assert cuda.asked == [
        "graph_pool_handle", "device", "in device",
        "Stream", "current_stream", "Stream waits for current_stream",
        "stream", "in stream", "run",
        "get_sync_debug_mode", "set_sync_debug_mode", "run", "set_sync_debug_mode", "out of stream",
        "current_stream", "current_stream waits for Stream",
        "CUDAGraph", "graph", "in graph", "run", "out of graph", "out of device",
    ]  # fmt: skip
    assert graph.replay().tolist() == [1, 1]
    assert cuda.asked[-1] == "replay"


def test_a_kernel_is_launched_on_the_gpu_that_holds_its_tensors(monkeypatch):
    chip = pytest.importorskip("core.kernels.chip")
    cuda = PlayedCuda()
    monkeypatch.setattr(torch, "cuda", cuda)

    class Kernel:
        def __getitem__(self, grid):
            return lambda **_: cuda.asked.append(f"launch {grid}")

    chip.Chip(chip.TARGETS["sm_90"], 1).run(chip.Launch(Kernel(), (3,), {}))
    assert cuda.asked == ["device", "in device", "launch (3,)", "out of device"]
