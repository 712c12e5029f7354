"""Fast kernels for linears on a CPU: weights of 4, 8 and 16 bits are multiplied as they lie in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core import hookimpl

if TYPE_CHECKING:
    from core.config import EngineConfig
    from core.contracts import Kernels

CORE_API = (1, 0)


@hookimpl
def provide_kernels(device: str, options: EngineConfig) -> Kernels | None:
    if device.split(":")[0] != "cpu":
        return None
    from core_cpu_kernels.kernels import CpuKernels

    return CpuKernels()
