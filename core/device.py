"""What the engine asks of the device that it runs on; everything that talks to torch.cuda is here.

A CPU needs none of it: `HostDevice` stages nothing, so a step's tensors are used where they were made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class NotCaptured(Exception):
    """Why a run of kernels cannot be captured, or not be replayed."""


class Graph(Protocol):
    """A captured run of kernels."""

    def replay(self) -> Tensor:
        """Run it again on what its inputs hold now; returns the same tensor each time, overwritten."""
        ...


class DeviceModule(Protocol):
    """One device. A test's own counts what is asked of it."""

    device: torch.device
    stages: bool  # True: inputs are made in the host's memory and copied

    def memory(self) -> tuple[int, int]:
        """Return the bytes that are free and those that there are."""
        ...

    def host_buffer(self, size: int) -> Tensor:
        """Return `size` bytes (uint8) of the host that the device reads without waiting for the host."""
        ...

    def buffer(self, size: int) -> Tensor:
        """Return `size` bytes (uint8) of the device."""
        ...

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy host to device, behind what was asked for before, without waiting for it."""
        ...

    def read(self, x: Tensor) -> Tensor:
        """Return x on the host; waits until the device has come so far."""
        ...

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        """Record what `run` does; it runs at least once. Raises NotCaptured if it waits or copies."""
        ...


class HostDevice:
    """The CPU: the host's memory is its own."""

    stages = False

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    def memory(self) -> tuple[int, int]:
        raise NotImplementedError("K/V memory of a CPU is what was asked for, not a share of what is free.")

    def host_buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def read(self, x: Tensor) -> Tensor:
        return x

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        raise NotImplementedError("A CPU has no graphs.")


class CudaGraph:  # pragma: no cover - gpu
    """torch.cuda.CUDAGraph with the tensor that it fills."""

    def __init__(self, run: Callable[[], Tensor], pool: Any) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.output = run()

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.output


class CudaDevice:  # pragma: no cover - gpu
    """CUDA, and ROCm under the same names. torch keeps pinned memory until the copies out of it are done."""

    stages = True

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        torch.backends.cudnn.allow_tf32 = False  # float32, where it is asked for; torch's products have it so already

    def memory(self) -> tuple[int, int]:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return free, total

    def host_buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def read(self, x: Tensor) -> Tensor:
        return x.cpu()

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        with torch.cuda.device(self.device):  # a graph is captured on the current one
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # kernels are compiled and libraries make workspaces: not to be captured
                run()
                _refuse_waiting(run)  # found out here: a capture that fails leaves the allocator in its state
            torch.cuda.current_stream().wait_stream(side)
            try:
                return CudaGraph(run, self.pool)
            except RuntimeError as error:
                raise NotCaptured(_first_line(error)) from error


def _refuse_waiting(run: Callable[[], Tensor]) -> None:  # pragma: no cover - gpu
    """Run as in a capture, for which some modules have a way of their own. Raises NotCaptured."""
    mode, capturing = torch.cuda.get_sync_debug_mode(), torch.cuda.is_current_stream_capturing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is new
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        run()
    except RuntimeError as error:
        raise NotCaptured(f"a step waits for the GPU ({_first_line(error)})") from error
    finally:
        torch.cuda.is_current_stream_capturing = capturing
        torch.cuda.set_sync_debug_mode(mode)


def forget_cached(device: torch.device) -> None:
    """Give what torch keeps of a GPU's freed memory back to it."""
    if device.type == "cuda":  # pragma: no cover - gpu
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def device_module(device: torch.device) -> DeviceModule:
    """Return what talks to a device."""
    return CudaDevice(device) if device.type == "cuda" else HostDevice(device)
