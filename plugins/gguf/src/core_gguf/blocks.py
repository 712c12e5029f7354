"""A weight that stays in the blocks of its GGUF file, for any device and any of the types that can be decoded."""

from __future__ import annotations

from torch import Tensor

from core.layers import QuantizedTensor
from core_gguf.dequant import dequantize


class GGMLTensor(QuantizedTensor):
    """Part: `blocks`, uint8 [..., out, bytes of a row], as llama.cpp lays them out. Setting: `kind`, a GGMLType.

    The packing is "ggml:" and the type's name, e.g. "ggml:Q4_K".
    """

    @property
    def packing(self) -> str:  # type: ignore[override]
        return f"ggml:{self.settings['kind'].name}"

    def decode(self) -> Tensor:
        return dequantize(self.parts["blocks"], self.settings["kind"])
