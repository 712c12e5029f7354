"""What --quantization means for a GGUF file: weights stay in their blocks, or become floats while they are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from core.errors import ConfigError
from core_gguf.checkpoint import GGUFCheckpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from core.config import EngineConfig
    from core.contracts import Checkpoint, QuantMethod
    from core.spec import ModelSpec

BLOCKS, FLOATS = "gguf", "gguf-floats"


def choose_method(spec: ModelSpec, options: EngineConfig) -> QuantMethod | None:
    """Return the method for a GGUF file. Raises ConfigError where one of these is asked for and the file is another."""
    asked = options.quantization
    if spec.format != "gguf":
        if asked in (BLOCKS, FLOATS):
            raise ConfigError(f"--quantization {asked} is for GGUF files, and {spec.path} is none. Leave it out.")
        return None
    if asked in (None, BLOCKS):
        return GGUFBlocks()
    return GGUFFloats() if asked == FLOATS else None


class GGUFBlocks:
    """A `core.contracts.QuantMethod`: every matrix of the file stays as it is."""

    name = BLOCKS
    on_the_fly = False

    def tensors(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield matrices as GGMLTensor of `dtype`, and norms and biases as float32."""
        assert isinstance(checkpoint, GGUFCheckpoint), "claimed for GGUF files only"
        return checkpoint.quantized_tensors(dtype)

    def quantize(self, name: str, weight: Tensor) -> Tensor:
        """Return the weight: nothing is quantized on the fly."""
        return weight


class GGUFFloats(GGUFBlocks):
    """A `core.contracts.QuantMethod` that keeps nothing small: for who has more memory than time."""

    name = FLOATS

    def tensors(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor as float32."""
        return checkpoint.tensors()
