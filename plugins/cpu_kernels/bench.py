"""Time the kernels against torch's own and against what memory and sgemm allow, by rows of x.

    python plugins/cpu_kernels/bench.py [--shape 1536x576]... [--isa avx2] [--threads 2] [--only affine4]

A shape is out x in. Milliseconds, the tenth percentile of calls; with one thread its own time, otherwise the clock's.
Each call takes another copy of the weight, as a model does, so that it comes from memory (`--copies 1`: the cache).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from core.layers import AffineTensor, QuantizedTensor, TableTensor
from core.layers.linear import PackedLinear
from core_cpu_kernels.kernels import CpuKernels

SHAPES = ("1536x576", "576x1536", "49152x576", "8192x2048")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
WORKING_SET = 96 << 20  # bytes of weights that a round goes through, several times the last-level cache's
Run = Callable[[Tensor], Tensor]
clock = time.perf_counter


def best_ms(runs: Sequence[Run], x: Tensor, seconds: float = 0.25) -> float:
    """Call all copies in turn; the tenth percentile of single calls, which a busy machine disturbs least."""
    for run in runs[:2]:
        run(x)
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < end:
        for run in runs:
            start = clock()
            run(x)
            taken.append(clock() - start)
    return sorted(taken)[len(taken) // 10] * 1e3


def read_bandwidth() -> float:
    """Bytes a second: a sum over 256 MiB of float32."""
    data = torch.ones(64 << 20)
    return data.nbytes / best_ms([lambda _: data.sum()], data) * 1e3


def sgemm_flops() -> float:
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / best_ms([lambda x: x @ x], a, 1.0) * 1e3


def affine(bits: int, out: int, size: int, group: int) -> AffineTensor:
    groups = size // group
    parts = {
        "codes": torch.randint(0, 256, (out, size * bits // 8), dtype=torch.uint8),
        "scales": torch.rand(out, groups).half() * 0.02,
        "zeros": torch.randint(0, 1 << bits, (out, groups), dtype=torch.uint8),
    }
    return AffineTensor(parts, size, torch.float32, bits=bits, group_size=group)


def table(out: int, size: int, group: int) -> TableTensor:
    parts = {
        "codes": torch.randint(0, 256, (out, size // 2), dtype=torch.uint8),
        "scales": torch.rand(out, size // group),
    }
    return TableTensor(parts, size, torch.float32, group_size=group, table=tuple(torch.linspace(-1, 1, 16).tolist()))


def blocks(kind: str, size_bytes: int, columns: int, out: int, size: int) -> QuantizedTensor:
    """Zeros: the time does not depend on what the blocks say."""
    return Blocks(
        {"blocks": torch.zeros(out, size // columns * size_bytes, dtype=torch.uint8)}, size, torch.float32, kind=kind
    )


class Blocks(QuantizedTensor):
    """Only its bytes are looked at."""

    @property
    def packing(self) -> str:  # type: ignore[override]
        return f"ggml:{self.settings['kind']}"

    def decode(self) -> Tensor:
        raise NotImplementedError


GGML = {"Q4_0": (18, 32), "Q4_1": (20, 32), "Q8_0": (34, 32), "Q4_K": (144, 256), "Q6_K": (210, 256)}


def candidates(out: int, size: int, group: int, kernels: CpuKernels) -> dict[str, tuple[float, Callable[[], Run]]]:
    """Return name -> (bytes of a weight, what makes one more copy)."""
    floats = out * size

    def ours(make: Callable[[], Tensor]) -> Callable[[], Run]:
        def one() -> Run:
            found = kernels.linear(make(), None)
            assert found is not None
            return found

        return one

    def plain() -> Run:
        weight = torch.randn(out, size)
        return lambda x: F.linear(x, weight)

    def int8pack() -> Run:
        weight, scales = torch.randint(-128, 127, (out, size), dtype=torch.int8), torch.rand(out).bfloat16()
        return lambda x: torch._weight_int8pack_mm(x.bfloat16(), weight, scales)

    def int4pack() -> Run:
        packed = torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (out, size), dtype=torch.int32), 1)
        scales = torch.rand(size // group, out, 2).bfloat16()
        return lambda x: torch._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, group, scales)

    grouped = 3 * floats / group  # a half and a byte for each group
    ggml = {
        kind: (floats / columns * size_bytes, ours(partial(blocks, kind, size_bytes, columns, out, size)))
        for kind, (size_bytes, columns) in GGML.items()
        if size % columns == 0
    }
    return {
        "F.linear": (4 * floats, plain),
        "oneDNN packed": (4 * floats, lambda: PackedLinear(torch.randn(out, size), None)),
        "torch int8pack, bf16": (floats, int8pack),
        "torch int4pack, bf16": (floats / 2 + grouped, int4pack),
        "float32": (4 * floats, ours(lambda: torch.randn(out, size))),
        "half": (2 * floats, ours(lambda: torch.randn(out, size).half())),
        "bfloat16": (2 * floats, ours(lambda: torch.randn(out, size).bfloat16())),
        "affine8": (floats + grouped, ours(lambda: affine(8, out, size, group))),
        "affine4": (floats / 2 + grouped, ours(lambda: affine(4, out, size, group))),
        "table4": (floats / 2 + 4 * floats / group, ours(lambda: table(out, size, group))),
        **ggml,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", help="OUTxIN")
    parser.add_argument("--isa", default=None, help="amx, avx512vnni, avx512, avx2 or plain")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", action="append", help="names to measure")
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--group", type=int, default=64, help="columns that share a scale, of affine and table weights")
    parser.add_argument("--copies", type=int, default=0, help="of each weight; 0: as many as the cache cannot hold")
    parser.add_argument("--seconds", type=float, default=0.25, help="for each number")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.threads == 1:  # then the thread's own time is all there is, and other processes do not count
        global clock
        clock = time.thread_time
    kernels, rows = CpuKernels(options.isa), options.rows or ROWS
    bandwidth, flops = read_bandwidth(), sgemm_flops()
    print(f"{kernels.name}, {options.threads} threads", end="; ")
    print(f"reading {bandwidth / 1e9:.1f} GB/s, sgemm {flops / 1e9:.0f} GFLOP/s")
    for shape in options.shape or SHAPES:
        out, size = (int(part) for part in shape.split("x"))
        print(f"\n{shape:22}" + "".join(f"{count:>9}" for count in rows) + "   rows")
        print(f"{'sgemm bound':22}" + "".join(f"{2 * out * size * count / flops * 1e3:9.3f}" for count in rows))
        for name, (size_bytes, make) in candidates(out, size, options.group, kernels).items():
            if options.only and name not in options.only:
                continue
            copies = options.copies or max(1, min(64, int(WORKING_SET / size_bytes)))
            with torch.inference_mode():
                runs = [make() for _ in range(copies)]
                found = [best_ms(runs, torch.randn(count, size), options.seconds) for count in rows]
            memory = f"   memory bound {size_bytes / bandwidth * 1e3:.3f}"
            print(f"{name:22}" + "".join(f"{ms:9.3f}" for ms in found) + memory, flush=True)


if __name__ == "__main__":
    main()
