"""What the machine can do at best, measured in the same run as the engine: arithmetic, and reading memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from core.kernel_contracts import Kernels

SIZE = 1024  # of the square matrices
ROWS = 8192  # of the matrix that a kernel reads
READ_BYTES = 256 * 1024**2  # beyond every cache
SECONDS = 0.4  # for one measurement


@dataclass(frozen=True)
class Ceilings:
    """The best of many tries, on the engine's device with the engine's threads."""

    gflops: float  # 10^9 multiplications and additions a second, of a matrix product
    dtype: str  # of that product
    reads: Mapping[str, float]  # GB/s, by how memory was read
    threads: int

    @property
    def read_gb_s(self) -> float:
        """The fastest way to read memory."""
        return max(self.reads.values())

    def seconds(self, flops: float, num_bytes: float) -> float:
        """Return the least time for so much arithmetic and reading, one behind the other's back."""
        return max(flops / (self.gflops * 1e9), num_bytes / (self.read_gb_s * 1e9))


def measure_ceilings(device: torch.device, dtype: torch.dtype, kernels: Kernels | None = None) -> Ceilings:
    """Measure the engine's device; `kernels` are what it multiplies with, whose reading is timed too."""
    with torch.inference_mode():
        a, b = (torch.rand(SIZE, SIZE, dtype=dtype, device=device) for _ in range(2))
        gflops = 2 * SIZE**3 / best_seconds(lambda: a @ b, device) / 1e9
        reads = _reads(device)
        through = None if kernels is None else _kernel_read(kernels, device)
    if kernels is not None and through is not None:
        reads[kernels.name] = through
    return Ceilings(gflops, str(dtype).removeprefix("torch."), reads, torch.get_num_threads())


def _reads(device: torch.device) -> dict[str, float]:
    memory = torch.ones(READ_BYTES // 4, device=device)
    halves = memory.view(2, -1)
    ways: dict[str, Callable[[], Tensor]] = {"sum": memory.sum, "dot": lambda: halves[0] @ halves[1]}
    return {name: READ_BYTES / best_seconds(way, device) / 1e9 for name, way in ways.items()}


def _kernel_read(kernels: Kernels, device: torch.device) -> float | None:
    """Multiply one row with a large bfloat16 weight, whose arithmetic is next to nothing; None without a kernel."""
    weight = torch.ones(ROWS, READ_BYTES // 2 // ROWS, dtype=torch.bfloat16, device=device)
    kernel = kernels.linear(weight, None)
    if kernel is None:
        return None
    row = torch.ones(1, weight.shape[1], device=device)
    return READ_BYTES / best_seconds(lambda: kernel(row), device) / 1e9


def best_seconds(run: Callable[[], Tensor], device: torch.device, limit: float = SECONDS) -> float:
    """Return the shortest time that `run` took, tried for `limit` seconds after one try that is not timed."""
    run()
    best, end = float("inf"), time.perf_counter() + limit
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
