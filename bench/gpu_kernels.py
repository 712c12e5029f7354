"""The GPU kernels of `core/kernels` on the GPU of this machine, beside its own ceilings and torch's operators.

    python bench/gpu_kernels.py [--json FILE] [--only decode,prefill,...]

Shapes are Llama-3-8B's unless a row says another. Ceilings are measured first: a pass over 1 GiB (bytes read and bytes
written) and a product of 8192 x 8192 matrices in bfloat16. Launches are timed in a captured graph, so that the host is
not, with the L2 cache cleared before each; "of ceiling" is the least time that bytes or operations allow, over the
measured one; "host" is what the host takes for a launch where nothing is captured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from core.contracts import AttentionArgs
from core.kernels.attention_call import PagedCall, prefill_tile, splits_for
from core.kernels.chip import chip_of
from core.kernels.dequant_matmul import Codes, dequant_matmul
from core.kernels.gated_activation import gated_activation
from core.kernels.grouped_matmul import grouped_matmul
from core.kernels.paged_decode import SPLIT, paged_decode
from core.kernels.paged_prefill import make_tiles, paged_prefill, tokens_of_a_tile
from core.kernels.rms_norm import rms_norm
from core.kernels.rotary import rotary
from core.kernels.sample import sample
from core.kernels.write_kv import write_kv

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
HIDDEN, INNER, VOCAB = 4096, 14336, 128256
HALF = torch.bfloat16
CUDA = torch.device("cuda")
CACHE = 2**28  # bytes, more than any L2
RUNS = 8  # in a graph


@dataclass(frozen=True)
class Work:
    """One launch, what it cannot do without, and torch's way to do the same."""

    name: str
    run: Callable[[], object]
    moved: float = 0.0  # bytes
    operations: float = 0.0
    torch: Callable[[], object] | None = None


@dataclass(frozen=True)
class Timed:
    """One row."""

    name: str
    us: float
    of_ceiling: float
    host_us: float
    torch_us: float | None


def microseconds(run: Callable[[], object]) -> float:
    """Return what one run takes the GPU."""
    cache = torch.empty(CACHE, dtype=torch.int8, device=CUDA)
    return max(0.01, _replayed(lambda: (cache.zero_(), run())) - _replayed(lambda: cache.zero_()))


def _replayed(run: Callable[[], object]) -> float:
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(RUNS):
            run()
    found = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(1e3 * start.elapsed_time(end) / RUNS)
    return statistics.median(found)


def host_microseconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    found = []
    for _ in range(21):
        began = time.perf_counter()
        run()
        found.append(1e6 * (time.perf_counter() - began))
    torch.cuda.synchronize()
    return statistics.median(found)


def ceilings() -> tuple[float, float]:
    """Return bytes and operations a second."""
    source = torch.randn(2**28, device=CUDA)
    target = torch.empty_like(source)
    # By a kernel: in a graph a plain copy is the copy engine's, which is slower.
    copied = 2 * source.nbytes / microseconds(lambda: torch.neg(source, out=target))
    a, b = (torch.randn(8192, 8192, device=CUDA, dtype=HALF) for _ in range(2))
    return copied * 1e6, 2 * 8192**3 / microseconds(lambda: a @ b) * 1e6


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=CUDA, dtype=HALF)


def ints(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=CUDA)


def paged(requests: int, context: int, new: int) -> PagedCall:
    """A cache whose blocks lie in random order."""
    blocks = -(-context // BLOCK)
    keys, values = (random(requests * blocks, BLOCK, KV_HEADS, DIM) for _ in range(2))
    tables = torch.randperm(requests * blocks, device=CUDA).int().view(requests, blocks)
    return PagedCall(keys, values, tables, ints([new * n for n in range(requests + 1)]), ints([context] * requests))


def decode() -> Iterator[Work]:
    args = AttentionArgs(scaling=DIM**-0.5)
    for requests, context in ((1, 4096), (1, 32768), (16, 4096), (64, 4096)):
        call, q = paged(requests, context, 1), random(requests, HEADS, DIM)
        out, rows = torch.empty_like(q), ints(list(range(requests)))
        k, v = (x[call.tables].flatten(1, 2).transpose(1, 2) for x in (call.keys, call.values))
        moved = 2 * requests * context * KV_HEADS * DIM * 2
        for split in sorted({256, 512, SPLIT}):
            splits = splits_for(context, split)
            yield Work(
                f"paged decode, {requests} x {context} keys, splits of {split}",
                partial(paged_decode, q, out, call, rows, splits, args, split=split),
                moved,
                torch=partial(F.scaled_dot_product_attention, q[:, :, None], k, v, enable_gqa=True),
            )


def prefill() -> Iterator[Work]:
    args = AttentionArgs(scaling=DIM**-0.5)
    for requests, new in ((1, 8192), (8, 1024)):
        call, q = paged(requests, new, new), random(requests * new, HEADS, DIM)
        out = torch.empty_like(q)
        tokens = tokens_of_a_tile(HEADS // KV_HEADS, prefill_tile(call, q, args, chip_of(q).target).rows)
        tiles = ints([n for tile in make_tiles([new] * requests, list(range(requests)), tokens) for n in tile]).view(
            -1, 2
        )
        heads = q.view(requests, new, HEADS, DIM).transpose(1, 2)
        k, v = (x[call.tables].flatten(1, 2).transpose(1, 2) for x in (call.keys, call.values))
        yield Work(
            f"paged prefill, {requests} x {new} tokens",
            partial(paged_prefill, q, out, call, tiles, args),
            operations=4 * requests * HEADS * DIM * new * new / 2,
            torch=partial(F.scaled_dot_product_attention, heads, k, v, is_causal=True, enable_gqa=True),
        )


def products() -> Iterator[Work]:
    weight = random(INNER, HIDDEN)
    for bits in (4, 8):
        codes = torch.randint(0, 256, (INNER, HIDDEN * bits // 8), dtype=torch.uint8, device=CUDA)
        scales, zeros = random(INNER, HIDDEN // 128), torch.zeros(INNER, HIDDEN // 128, dtype=torch.uint8, device=CUDA)
        kept = Codes(codes, scales, bits, 128, HIDDEN, zeros)
        for rows in (1, 16, 64, 512, 4096):
            x, y = random(rows, HIDDEN), random(rows, INNER)
            yield Work(
                f"{bits}-bit product, {rows} rows",
                partial(dequant_matmul, x, kept, y),
                codes.nbytes + scales.nbytes + zeros.nbytes + x.nbytes + y.nbytes,
                2 * rows * INNER * HIDDEN,
                partial(F.linear, x, weight),
            )


def experts() -> Iterator[Work]:
    count, hidden, inner, picked = 128, 2048, 768, 8  # Qwen3-30B-A3B
    weights = random(count, inner, hidden)
    for tokens in (1, 64, 4096):
        chosen = torch.randint(0, count, (tokens * picked,), device=CUDA).sort().values
        starts = torch.searchsorted(chosen, torch.arange(count + 1, device=CUDA)).int()
        x, y = random(tokens * picked, hidden), random(tokens * picked, inner)
        read = len(chosen.unique()) * inner * hidden * 2
        yield Work(
            f"experts (Qwen3-30B-A3B), {tokens} tokens",
            partial(grouped_matmul, x, weights, starts, y),
            read + x.nbytes + y.nbytes,
            2 * len(x) * inner * hidden,
        )


def rows() -> Iterator[Work]:
    for count in (1, 4096):
        x, weight, gates = random(count, HIDDEN), random(HIDDEN), random(count, 2 * INNER)
        out, halved = torch.empty_like(x), random(count, INNER)
        q, angles = random(count, HEADS, DIM), random(count, DIM // 2)
        yield Work(
            f"RMSNorm, {count} rows",
            partial(rms_norm, x, weight, 1e-5, out),
            2 * x.nbytes,
            torch=partial(F.rms_norm, x, (HIDDEN,), weight, 1e-5),
        )
        yield Work(f"rotary, {count} tokens", partial(rotary, q, angles, angles, q), 2 * q.nbytes)
        yield Work(f"SiLU and mul, {count} rows", partial(gated_activation, gates, halved), 1.5 * gates.nbytes)
        k = random(count, KV_HEADS, DIM)
        call, slots = paged(1, 65536, 1), torch.randperm(65536, device=CUDA)[:count]
        yield Work(
            f"write K and V, {count} tokens",
            partial(write_kv, k, k, call.keys, call.values, slots),
            4 * k.nbytes,
        )


def samples() -> Iterator[Work]:
    for count in (1, 64):
        logits = random(count, VOCAB).float()
        doubles = [torch.full((count,), value, dtype=torch.float64, device=CUDA) for value in (0.8, 0.95, 0.0)]
        longs = [torch.arange(count, device=CUDA) for _ in range(3)]
        top_k = torch.full((count,), 50, dtype=torch.int32, device=CUDA)
        yield Work(
            f"sample top-k, top-p, {count} rows",
            partial(sample, logits, doubles[0], top_k, doubles[1], doubles[2], *longs),
            logits.nbytes,
        )


PARTS = {
    "decode": decode,
    "prefill": prefill,
    "products": products,
    "experts": experts,
    "rows": rows,
    "samples": samples,
}


def timed(work: Work, bandwidth: float, rate: float) -> Timed:
    us = microseconds(work.run)
    least = max(work.moved / bandwidth, work.operations / rate) * 1e6
    return Timed(
        work.name, us, least / us, host_microseconds(work.run), microseconds(work.torch) if work.torch else None
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default=",".join(PARTS))
    asked = parser.parse_args()
    bandwidth, rate = ceilings()
    print(f"{torch.cuda.get_device_name()}: {bandwidth / 1e12:.2f} TB/s, {rate / 1e12:.0f} TFLOP/s in bfloat16")
    found = []
    for part in asked.only.split(","):
        for work in PARTS[part]():
            found.append(timed(work, bandwidth, rate))
            beside = "" if found[-1].torch_us is None else f"   torch {found[-1].torch_us:9.1f} us"
            row = f"{work.name:48} {found[-1].us:9.1f} us  {found[-1].of_ceiling:5.0%} of ceiling"
            print(f"{row}   host {found[-1].host_us:6.1f} us{beside}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in found], indent=1))


if __name__ == "__main__":
    main()
