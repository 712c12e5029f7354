"""Formats that no plugin reads and transformers can: its own quantizer builds the module's quantized layers.

They need the format's library, run as that library runs them, and keep what it keeps in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from core.contracts import Checkpoint
from core.errors import ConfigError
from core.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from core.config import EngineConfig

logger = logging.getLogger("core_serve.hf_fallback")

# What core-serve's own plugins read: they keep less in memory, have kernels, and serve native models too.
HAVE_PLUGINS = frozenset(
    {"awq", "gptq", "auto-round", "bitsandbytes", "compressed-tensors", "fp8", "fbgemm_fp8", "gguf"}
)
# What pip calls the libraries that transformers needs for a method, where it is not called like the method.
LIBRARIES = {
    "quanto": "optimum-quanto",
    "aqlm": "'aqlm[cpu]'",
    "eetq": "kernels",
    "nvfp4": "kernels",
    "quark": "amd-quark",
    "higgs": "flute-kernel fast-hadamard-transform",
    "spqr": "'spqr_quant[gpu]'",
}


class TransformersQuantization:
    """A `core.contracts.QuantMethod` in name only: `by_transformers` says that transformers' loader does the work."""

    on_the_fly = False
    by_transformers = True

    def __init__(self, name: str) -> None:
        self.name = name

    def tensors(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        raise ConfigError(
            f"{checkpoint.spec.path} is quantized with {self.name!r}, which only transformers reads. Serve it with "
            "--model-impl transformers."
        )

    @property
    def library(self) -> str:
        """What to give pip for it."""
        return LIBRARIES.get(self.name, self.name)

    def quantize(self, name: str, weight: Tensor) -> Tensor:
        raise NotImplementedError(f"{self.name} checkpoints come quantized")


def passed_through(spec: ModelSpec, options: EngineConfig) -> TransformersQuantization | None:
    """Claim a checkpoint for transformers' own quantizer, where it has one and no plugin of ours reads the format."""
    stated = spec.quantization_config
    name = stated.get("quant_method") if stated is not None else None
    if not isinstance(name, str) or name in HAVE_PLUGINS or options.quantization not in (None, name):
        return None
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return TransformersQuantization(name) if name in AUTO_QUANTIZATION_CONFIG_MAPPING else None
