"""The core's own hook implementations: asked last. Everything heavy is imported where it is used."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from core import API_VERSION
from core.contracts import Bid, Refusal
from core.hookspecs import hookimpl

if TYPE_CHECKING:
    from core.config import EngineConfig
    from core.contracts import AttentionBackend, Checkpoint, Tokenizer
    from core.kernel_contracts import Kernels
    from core.spec import ModelSpec

CORE_API = API_VERSION
CPU_PRIORITY = 50
TRITON_PRIORITY = 60
REFERENCE_PRIORITY = 1  # plain and right, so whatever else can serves instead
INTERPRETED_PRIORITY = 0  # a hundred times slower still; for tests of the kernels, chosen by name


@hookimpl
def provide_checkpoint(path: str, options: EngineConfig) -> Checkpoint | None:
    """Open a Hugging Face folder."""
    from core.weights import HFCheckpoint, is_hf_folder

    return HFCheckpoint(path) if is_hf_folder(path) else None


@hookimpl
def provide_tokenizer(spec: ModelSpec, options: EngineConfig) -> Tokenizer | None:
    """Load the tokenizer of a Hugging Face folder, or the one that --tokenizer-path names."""
    if spec.format != "hf" and options.tokenizer is None:
        return None
    from core.tokenizer import load_hf_tokenizer

    return load_hf_tokenizer(spec, options)


@hookimpl
def resolve_attention_backend(
    spec: ModelSpec, options: EngineConfig
) -> Bid[AttentionBackend] | Refusal | list[Bid[AttentionBackend] | Refusal] | None:
    """Offer the backend of the device that the engine runs on, and the reference anywhere."""
    reference: Bid[AttentionBackend] = Bid("torch_reference", REFERENCE_PRIORITY, _build_reference, {"device": "any"})
    if _runs_on_cpu(options.device):
        return [Bid("cpu", CPU_PRIORITY, _build_cpu, {"device": "cpu"}), _triton_on_cpu(), reference]
    declined = Refusal(f"cpu attention runs on the CPU only, and the device is {options.device!r}")
    return [declined, _triton_on_gpu(options.device), reference]


@hookimpl
def provide_kernels(device: str, options: EngineConfig) -> Kernels | None:
    """Offer the Triton kernels on CUDA and ROCm; on a CPU in the interpreter, beside Triton's attention."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and options.attention_backend_name == "triton"
    if not device.startswith("cuda") and not (device == "cpu" and interpreted):
        return None
    if _need_triton() is not None:
        return None
    from core.kernels.provided import TritonKernels

    return TritonKernels()


def _triton_on_gpu(device: str) -> Bid[AttentionBackend] | Refusal:
    if device != "auto" and not device.startswith("cuda"):  # torch calls ROCm's devices cuda too
        return Refusal(f"triton attention runs on CUDA and ROCm, and the device is {device!r}")
    return _need_triton() or Bid("triton", TRITON_PRIORITY, _build_triton, {"device": "cuda, rocm"})


def _triton_on_cpu() -> Bid[AttentionBackend] | Refusal:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return Refusal(
            "triton attention runs on CUDA and ROCm; on the CPU only in Triton's interpreter, for tests: "
            "set TRITON_INTERPRET=1"
        )
    return _need_triton() or Bid("triton", INTERPRETED_PRIORITY, _build_triton, {"device": "cpu, interpreted"})


def _need_triton() -> Refusal | None:
    if importlib.util.find_spec("triton") is not None:
        return None
    return Refusal("triton attention needs Triton, which is not installed: pip install 'core-serve[gpu]'")


def _runs_on_cpu(device: str) -> bool:
    if device != "auto":
        return device == "cpu"
    import torch

    return not torch.cuda.is_available()


def _build_cpu() -> AttentionBackend:
    from core.attention.cpu import CpuAttention

    return CpuAttention()


def _build_triton() -> AttentionBackend:
    from core.attention.triton import TritonAttention

    return TritonAttention()


def _build_reference() -> AttentionBackend:
    from core.attention.torch_reference import TorchReferenceAttention

    return TorchReferenceAttention()
