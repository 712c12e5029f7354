"""GGUFCheckpoint: a .gguf file as core's Checkpoint: config, and tensors as float32 or as the file's own blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.errors import CheckpointError
from core.spec import ModelSpec
from core_gguf.dequant import SUPPORTED, dequantize
from core_gguf.ggml_types import GGMLType
from core_gguf.model_config import read_config, special_ids
from core_gguf.names import TensorSource, tensor_sources
from core_gguf.reader import GGUFFile
from core_gguf.stop_tokens import eos_token_ids

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RawTensor:
    """A tensor as the file holds it, for a quantization plugin. Value = decode(data) - minus."""

    name: str  # transformers' name
    shape: tuple[int, ...]  # of the decoded tensor, in torch's order
    type: GGMLType
    data: NDArray[np.uint8]  # [rows, row_bytes], rows in transformers' order; read-only
    minus: float = 0.0  # Gemma's norms are stored plus one


class GGUFCheckpoint:
    """Opened lazily: the head is parsed, tensors stay in the mapped file until asked for."""

    def __init__(self, file: GGUFFile, spec: ModelSpec, sources: Mapping[str, TensorSource]) -> None:
        self.file = file
        self.spec = spec
        self._sources = sources

    @classmethod
    def open(cls, path: Path) -> GGUFCheckpoint:
        """Read the head of the file. Raises CheckpointError if it cannot be served."""
        file = GGUFFile.open(path)
        spec = ModelSpec(path=path, format="gguf", config=read_config(file), generation_config=_generation_config(file))
        return cls(file, spec, tensor_sources(file))

    def tensor_names(self) -> Sequence[str]:
        """Return the names of all tensors, under transformers' naming, in file order."""
        return tuple(self._sources)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every (name, float32 tensor) once. Raises CheckpointError, before the first, for an unknown type."""
        self._check_types()
        for name in self._sources:
            yield name, self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, dequantized to float32."""
        import torch

        raw = self.raw(name)
        self._check_type(raw.name, raw.type)
        values = dequantize(raw.data, raw.type)
        if raw.minus:
            values -= np.float32(raw.minus)
        return torch.from_numpy(values).reshape(raw.shape)

    def raw(self, name: str) -> RawTensor:
        """Return one tensor's blocks, of any ggml type, without decoding them."""
        source = self._sources.get(name)
        if source is None:
            raise CheckpointError(f"{self.file.path} holds no tensor for {name!r}.")
        data = self.file.raw(source.info)
        if source.rope_heads:
            data = _undo_rope_order(data.reshape(source.info.shape[0], -1), source.rope_heads)
        return RawTensor(name, source.info.shape, source.info.type, data, source.minus)

    def _check_types(self) -> None:
        for source in self._sources.values():
            self._check_type(source.name, source.info.type)

    def _check_type(self, name: str, kind: GGMLType) -> None:
        if kind.name in SUPPORTED:
            return
        own_name = self._sources[name].info.name
        raise CheckpointError(
            f"{self.file.path}: tensor {own_name!r} is of type {kind.name}, which cannot be decoded. "
            f"Supported: {', '.join(sorted(SUPPORTED))}. Quantize the model to one of them."
        )


def _undo_rope_order(rows: NDArray[np.uint8], heads: int) -> NDArray[np.uint8]:
    """Bring rows from llama.cpp's order (pairs side by side) to transformers' (first halves, then second halves).

    Rows of a head in the file: 0, h, 1, h + 1, 2, h + 2 ... with h = half the head's rows.
    """
    half = len(rows) // heads // 2
    data = rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(len(rows), -1)
    data.flags.writeable = False
    return data


def _generation_config(file: GGUFFile) -> dict[str, Any]:
    """What generation_config.json would say: the ids that start, pad and end a text."""
    stops = eos_token_ids(file)
    ids: dict[str, Any] = {name: value for name, value in special_ids(file).items() if name != "unk_token_id"}
    if stops:
        ids["eos_token_id"] = stops[0] if len(stops) == 1 else list(stops)
    return ids
