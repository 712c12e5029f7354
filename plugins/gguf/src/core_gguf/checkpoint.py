"""GGUFCheckpoint: a .gguf file as core's Checkpoint: config, and tensors as float32 or in the file's own blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import CheckpointError
from core.spec import ModelSpec
from core_gguf.ggml_types import GGMLType
from core_gguf.model_config import read_config, special_ids
from core_gguf.names import TensorSource, tensor_sources
from core_gguf.reader import GGUFFile
from core_gguf.stop_tokens import eos_token_ids

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HALVES = {"F16": "torch.float16", "BF16": "torch.bfloat16"}  # types that are plain tensors to a model of their dtype


@dataclass(frozen=True)
class RawTensor:
    """A tensor as the file holds it. Value = decode(data) - minus."""

    name: str  # transformers' name
    shape: tuple[int, ...]  # of the decoded tensor, in torch's order
    type: GGMLType
    data: Tensor  # uint8 [..., row_bytes] in transformers' order of rows: the mapped file itself, or a copy
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
        sources = tensor_sources(file)
        file.metadata.clear()  # a large vocabulary takes 30 MB, and the tokenizer reads it by itself
        return cls(file, spec, sources)

    def tensor_names(self) -> Sequence[str]:
        """Return the names of all tensors, under transformers' naming, in file order."""
        return tuple(self._sources)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every (name, float32 tensor) once. Raises CheckpointError, before the first, for an unknown type."""
        return self._stream(self.tensor)

    def quantized_tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield every (name, tensor) once; matrices stay in their blocks and are seen as `dtype`, the rest is float32.

        The blocks are the mapped file itself, or a copy where rows had to change places. Raises as `tensors` does.
        """
        return self._stream(lambda name: self._in_blocks(name, dtype))

    def _stream(self, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        for source in self._sources.values():
            self._check_type(source)
        for name, source in self._sources.items():
            yield name, read(name)
            self.file.forget(source.info)  # so that what was copied does not count twice
        self.file.forget()

    def forget_pages(self) -> None:
        """Let go of the mapped file's pages: those of weights that were copied (merged ones) are not read again."""
        self.file.forget()

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, dequantized to new float32 memory."""
        from core_gguf.dequant import dequantize

        raw = self.raw(name)
        self._check_type(self._sources[name])
        values = dequantize(raw.data, raw.type).view(raw.shape)
        return values.sub_(raw.minus) if raw.minus else values

    def _in_blocks(self, name: str, dtype: torch.dtype) -> Tensor:
        from core_gguf.blocks import GGMLTensor

        info = self._sources[name].info
        if len(info.shape) < 2 or info.type.name == "F32":
            return self.tensor(name)
        raw = self.raw(name)
        if str(dtype) == HALVES.get(info.type.name):
            return raw.data.view(dtype).clone()
        return GGMLTensor({"blocks": raw.data}, raw.shape[-1], dtype, kind=raw.type)

    def raw(self, name: str) -> RawTensor:
        """Return one tensor's blocks, of any ggml type, without decoding them."""
        import torch

        source = self._sources.get(name)
        if source is None:
            raise CheckpointError(f"{self.file.path} holds no tensor for {name!r}.")
        info = source.info
        data = torch.frombuffer(self.file.data, dtype=torch.uint8, count=info.nbytes, offset=info.start)
        data = data.view(*info.shape[:-1], info.row_bytes)
        if source.rope_heads:
            data = _undo_rope_order(data.view(info.shape[0], -1), source.rope_heads).view(data.shape)
        return RawTensor(name, info.shape, info.type, data, source.minus)

    def _check_type(self, source: TensorSource) -> None:
        from core_gguf.dequant import SUPPORTED

        if source.info.type.name in SUPPORTED:
            return
        raise CheckpointError(
            f"{self.file.path}: tensor {source.info.name!r} is of type {source.info.type.name}, which cannot be "
            f"decoded. Supported: {', '.join(sorted(SUPPORTED))}. Quantize the model to one of them."
        )


def _undo_rope_order(rows: Tensor, heads: int) -> Tensor:
    """Bring rows from llama.cpp's order (pairs side by side) to transformers' (first halves, then second halves).

    Rows of a head in the file: 0, h, 1, h + 1, 2, h + 2 ... with h = half the head's rows.
    """
    return rows.view(heads, -1, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def _generation_config(file: GGUFFile) -> dict[str, Any]:
    """What generation_config.json would say: the ids that start, pad and end a text."""
    stops = eos_token_ids(file)
    ids: dict[str, Any] = {name: value for name, value in special_ids(file).items() if name != "unk_token_id"}
    if stops:
        ids["eos_token_id"] = stops[0] if len(stops) == 1 else list(stops)
    return ids
