"""Where a kernel runs: the chips that we know, what they hold, and how one launch is made.

A wrapper builds a `Launch` and hands it to a `Chip`. A real chip runs it; a recording chip keeps it, which is how
`core-serve kernels compile` learns what the engine would launch on a chip that is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from core.errors import KernelError

KIB = 1024
INTERPRETED = bool(triton.knobs.runtime.interpret)  # read once, as triton.jit does: TRITON_INTERPRET=1 before import
LOG2E = 1.4426950408889634
REGISTERS = 65536  # of a processor of NVIDIA's


@dataclass(frozen=True)
class Target:
    """One architecture. Shared memory is what one program may ask for, registers what one thread may hold."""

    name: str
    backend: str  # "cuda", "hip" or "cpu" (the interpreter)
    arch: int | str
    warp_size: int
    shared_memory: int  # bytes
    registers: int  # of 4 bytes


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * KIB, 255),  # A100
        Target("sm_86", "cuda", 86, 32, 99 * KIB, 255),  # A10, RTX 30
        Target("sm_89", "cuda", 89, 32, 99 * KIB, 255),  # L4, L40, RTX 40
        Target("sm_90", "cuda", 90, 32, 227 * KIB, 255),  # H100, H200
        Target("sm_100", "cuda", 100, 32, 227 * KIB, 255),  # B200
        Target("sm_120", "cuda", 120, 32, 99 * KIB, 255),  # RTX 50
        Target("gfx90a", "hip", "gfx90a", 64, 64 * KIB, 512),  # MI250
        Target("gfx942", "hip", "gfx942", 64, 64 * KIB, 512),  # MI300X
    )
}
INTERPRETER = Target("interpreter", "cpu", "numpy", 32, 227 * KIB, 255)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, ready to run."""

    kernel: Any  # a @triton.jit function
    grid: tuple[int, ...]
    args: Mapping[str, Any]  # by the kernel's own names
    num_warps: int = 4
    num_stages: int = 2
    uses_tensor_cores: bool = False  # what `kernels compile` must find in the machine code
    loads_wide: bool = True  # 16 bytes at a time
    fuses: bool = True  # a * b + c in one rounding, also where the product was to be rounded to a half type before

    all_registers: bool = False  # NVIDIA: as many as a program can hold; else the compiler spills to hold several

    def options(self, target: Target) -> dict[str, Any]:
        """Return Triton's own options; the fusing is said aloud, since its default is to change."""
        found = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fuses}
        if self.all_registers and target.backend == "cuda":
            found["maxnreg"] = min(target.registers, REGISTERS // (self.num_warps * target.warp_size))
        return found


@dataclass(frozen=True)
class Chip:
    """A target and the way to run on it."""

    target: Target
    index: int | None = None  # of a GPU

    @property
    def interpreted(self) -> bool:
        return self.target.backend == "cpu"

    def run(self, launch: Launch) -> None:
        if 0 in launch.grid:
            return
        # Triton launches on the current GPU, wherever the tensors are.
        with nullcontext() if self.index is None else torch.cuda.device(self.index):
            launch.kernel[launch.grid](**launch.args, **launch.options(self.target))


@dataclass(frozen=True)
class RecordingChip(Chip):
    """Keeps launches instead of running them; tensors may be on the meta device."""

    launches: list[Launch] = field(default_factory=list)

    def run(self, launch: Launch) -> None:
        self.launches.append(launch)


def chip_of(tensor: Tensor) -> Chip:
    """Return the chip that holds a tensor. Raises KernelError on a device for which there are no kernels."""
    return _chip(tensor.device.type, tensor.device.index or 0)


@cache
def _chip(kind: str, index: int) -> Chip:
    if kind == "cpu" and INTERPRETED:
        return Chip(INTERPRETER)
    if kind != "cuda":
        raise KernelError(
            f"Triton kernels run on CUDA and ROCm devices, and the tensor is on {kind!r}. To run them slowly on a "
            "CPU, set TRITON_INTERPRET=1 before the process starts."
        )
    return Chip(device_target(torch.cuda.get_device_properties(index)), index)  # gpu


def device_target(properties: Any) -> Target:
    """Return the target of torch's device properties; an unknown chip gets what it says of itself."""
    arch = getattr(properties, "gcnArchName", None) if torch.version.hip else None
    name = arch.split(":")[0] if arch else f"sm_{properties.major}{properties.minor}"
    if name in TARGETS:
        return TARGETS[name]
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or 48 * KIB
    if arch:
        return Target(name, "hip", name, properties.warp_size, 64 * KIB, 256)
    return Target(name, "cuda", properties.major * 10 + properties.minor, 32, shared, 255)
