"""Fast kernels on a CPU: weights are multiplied, and K and V are attended to, as they lie in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core import hookimpl
from core.contracts import Bid, Refusal

if TYPE_CHECKING:
    from core.config import EngineConfig
    from core.contracts import AttentionBackend
    from core.kernel_contracts import Kernels
    from core.spec import ModelSpec

CORE_API = (1, 0)
ATTENTION_PRIORITY = 70  # above the core's own for CPUs


@hookimpl
def provide_kernels(device: str, options: EngineConfig) -> Kernels | None:
    if device.split(":")[0] != "cpu":
        return None
    from core_cpu_kernels.kernels import CpuKernels

    return CpuKernels()


@hookimpl
def resolve_attention_backend(spec: ModelSpec, options: EngineConfig) -> Bid[AttentionBackend] | Refusal:
    import torch

    if options.device != "cpu" and (options.device != "auto" or torch.cuda.is_available()):
        return Refusal(f"cpu_kernels attention runs on the CPU only, and the device is {options.device!r}")
    return Bid("cpu_kernels", ATTENTION_PRIORITY, _build_attention, {"device": "cpu"})


def _build_attention() -> AttentionBackend:
    from core_cpu_kernels.attention import CpuKernelAttention

    return CpuKernelAttention()
