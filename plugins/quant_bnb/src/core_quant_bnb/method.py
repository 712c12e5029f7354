"""The plugin's two QuantMethods: reading a checkpoint that bitsandbytes made, and making a float one small."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from core.contracts import Checkpoint
from core_quant_bnb import four_bit, int8
from core_quant_bnb.choice import NAME
from core_quant_bnb.read import read_tensors

HEADS = frozenset({"lm_head", "embed_out", "output_projection", "output_layer"})  # onto the vocabulary


class BnbCheckpoint:
    """A `core.contracts.QuantMethod`: what is quantized, and how, is read off the file's tensors."""

    name = NAME
    on_the_fly = False

    def tensors(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        return read_tensors(checkpoint, dtype)

    def quantize(self, name: str, weight: Tensor) -> Tensor:
        """Return the weight: nothing is quantized on the fly."""
        return weight


class BnbOnTheFly:
    """A `core.contracts.QuantMethod` that gives the codes and scales of bitsandbytes 0.50 with its default settings."""

    on_the_fly = True

    def __init__(self, kind: str) -> None:
        self.name = f"{NAME}-{kind}"
        self.kind = kind

    def tensors(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        return checkpoint.tensors()

    def quantize(self, name: str, weight: Tensor) -> Tensor:
        """Quantize a linear's weight; the head stays in floats, as transformers leaves it."""
        if name.removesuffix(".weight").rpartition(".")[2] in HEADS:
            return weight
        return int8.quantize(weight) if self.kind == "int8" else four_bit.quantize(weight, self.kind)
