"""One safetensors file, tensor by tensor, each read into memory of its own.

A mapped file would count as the process's memory for as long as one of its tensors is alive.
"""

from __future__ import annotations

import json
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


class SafetensorsFile:
    """Opening it reads the header. The header is trusted: whoever lists the file's names checks it first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._header: dict[str, Any] = json.loads(file.read(size))
        self._header.pop("__metadata__", None)
        self._start = 8 + size

    def tensor(self, name: str) -> Tensor:
        """Read one tensor. Raises CheckpointError naming file and tensor if its bytes are not all there."""
        import torch

        entry = self._header[name]
        begin, end = entry["data_offsets"]
        data = torch.empty(end - begin, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + begin)
            if not _filled(file, memoryview(data.numpy().data)):
                raise CheckpointError(f"{self.path} ends within tensor {name!r}. Download it again.")
        return data.view(self._dtype(name, entry["dtype"])).view(entry["shape"])

    def holds_integers(self, name: str) -> bool:
        """True if a tensor's type is one of whole numbers."""
        return str(self._header[name]["dtype"]).startswith(("I", "U", "BOOL"))

    def _dtype(self, name: str, stated: str) -> torch.dtype:
        import torch

        found = getattr(torch, DTYPES.get(stated, ""), None)
        if not isinstance(found, torch.dtype):
            raise CheckpointError(f"Tensor {name!r} of {self.path} is of type {stated}, which is not supported.")
        return found


def first_cut_tensor(path: Path) -> str | None:
    """Return the tensor that a file ends in, None if the header itself is damaged or all tensors are whole."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(size, path.stat().st_size)))
            held = path.stat().st_size - 8 - size
            ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
            return min((name for name, end in ends.items() if end > held), key=lambda name: ends[name], default=None)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return None


def _filled(file: FileIO, memory: memoryview) -> bool:
    """Read until the memory is full; one call gives 2 GB at most."""
    while len(memory):
        count = file.readinto(memory)
        if not count:
            return False
        memory = memory[count:]
    return True
