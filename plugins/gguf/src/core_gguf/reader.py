"""Read a GGUF file: header, metadata and where each tensor lies. Maps the file; knows nothing about models.

    magic "GGUF" | version u32 | tensors u64 | keys u64 | keys ... | tensor infos ... | padding | data
    string = length u64, UTF-8 bytes       array = item type u32, count u64, items

Everything is little-endian. A string array (a vocabulary) is walked with one struct call an item, which is what makes
a file of 260,000 tokens open in a fraction of a second.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from core.errors import CheckpointError
from core_gguf.ggml_types import GGML_TYPES, GGMLType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32  # bytes
MAX_DIMS = 4
BOOL, STRING, ARRAY = 7, 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}  # value type -> struct

T = TypeVar("T")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in the file."""

    name: str  # the file's own name, e.g. blk.0.attn_q.weight
    shape: tuple[int, ...]  # torch's order: the last dimension is contiguous
    type: GGMLType
    start: int  # bytes from the start of the file
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of the last dimension."""
        return self.shape[-1] // self.type.block_elements * self.type.block_bytes


class GGUFFile:
    """An opened file. `metadata` holds plain Python values; numeric arrays are numpy views of the mapped file."""

    def __init__(self, path: Path, data: mmap.mmap, metadata: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._data = data

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Map the file and parse its head. Raises CheckpointError naming the file and what is wrong in it."""
        data = _map(path)
        head = _Head(path, data)
        num_tensors, num_keys = head.counts()
        metadata = head.keys(num_keys)
        return cls(path, data, metadata, head.tensor_infos(num_tensors, metadata))

    @property
    def data(self) -> mmap.mmap:
        """The whole file, mapped. Whoever writes into it changes the file for all views of this process."""
        return self._data

    def raw(self, info: TensorInfo) -> NDArray[np.uint8]:
        """Return a read-only view of a tensor's bytes: [rows, row_bytes]."""
        flat = np.frombuffer(self._data, np.uint8, info.nbytes, info.start)
        flat.flags.writeable = False
        return flat.reshape(-1, info.row_bytes)

    def forget(self, info: TensorInfo | None = None) -> None:
        """Give the memory of a tensor, or of the whole file, back to the system; views of it read the file again."""
        if not hasattr(mmap, "MADV_DONTNEED"):  # Windows, which has no such call
            return
        start, size = (0, len(self._data)) if info is None else (info.start, info.nbytes)
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        self._data.madvise(mmap.MADV_DONTNEED, page, start + size - page)

    def get(self, key: str, kind: type[T], default: T | None = None) -> T | None:
        """Return metadata `key`, `default` if the file lacks it; CheckpointError if it is of another kind."""
        value = self.metadata.get(key)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            shown = f"{value!r:.60}"
            raise CheckpointError(f"{self.path}: key {key!r} is {shown}, but {kind.__name__} is needed.")
        return value

    def require(self, key: str, kind: type[T]) -> T:
        """Return metadata `key`; CheckpointError if the file lacks it."""
        value = self.get(key, kind)
        if value is None:
            raise CheckpointError(f"{self.path} lacks the key {key!r}, which this model cannot do without.")
        return value


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            # Copy on write: torch warns of memory that cannot be written, though nobody writes into this.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise CheckpointError(f"Cannot open {path} as GGUF: {error}.") from error


class _Head:
    """A cursor over the head of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.pos = 0
        self.reading = "the header"  # what is being read, for messages

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem} The file is corrupt or was not downloaded whole.")

    def unpack(self, layout: str) -> tuple[Any, ...]:
        try:
            values = struct.unpack_from("<" + layout, self.data, self.pos)
        except struct.error as error:
            raise self.fail(f"it ends at byte {self.size:,}, inside {self.reading}.") from error
        self.pos += struct.calcsize("<" + layout)
        return values

    def counts(self) -> tuple[int, int]:
        """Check magic and version; return (number of tensors, number of keys)."""
        if self.data[:4] != MAGIC:
            raise CheckpointError(f"{self.path} is not a GGUF file: it starts with {self.data[:4]!r}, not {MAGIC!r}.")
        self.pos = 4
        (version,) = self.unpack("I")
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in VERSIONS and swapped in (1, *VERSIONS):
            raise CheckpointError(f"{self.path} is a big-endian GGUF file; convert it to little-endian first.")
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise CheckpointError(
                f"{self.path} is GGUF version {version}; versions {known} can be read. Convert it again."
            )
        num_tensors, num_keys = self.unpack("QQ")
        return num_tensors, num_keys

    def keys(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(count):
            self.reading = f"the name of key {index} of {count}"
            key = self.string()
            if key in metadata:
                raise self.fail(f"the key {key!r} is there twice.")
            self.reading = f"the key {key!r}"
            (value_type,) = self.unpack("I")
            metadata[key] = self.value(value_type)
        return metadata

    def value(self, value_type: int) -> Any:
        if value_type == STRING:
            return self.string()
        if value_type == ARRAY:
            item_type, count = self.unpack("IQ")
            return self.array(item_type, count)
        if value_type == BOOL:
            return self.unpack("B")[0] != 0
        if value_type not in SCALARS:
            raise self.fail(f"{self.reading} has the unknown value type {value_type}.")
        return self.unpack(SCALARS[value_type])[0]

    def string(self) -> str:
        (length,) = self.unpack("Q")
        start, self.pos = self.pos, self.pos + length
        self.check_end()
        return self.text(self.data[start : self.pos])

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{self.reading} holds {raw[:40]!r}, which is not UTF-8.") from error

    def check_end(self) -> None:
        if self.pos > self.size:
            raise self.fail(f"{self.reading} ends at byte {self.pos:,}, after the file's end at {self.size:,}.")

    def array(self, item_type: int, count: int) -> Any:
        if item_type == STRING:
            return self.strings(count)
        layout = "?" if item_type == BOOL else SCALARS.get(item_type)
        if layout is None:
            raise self.fail(f"{self.reading} is an array of the unsupported value type {item_type}.")
        item = np.dtype("bool" if item_type == BOOL else "<" + layout)
        start, self.pos = self.pos, self.pos + count * item.itemsize
        self.check_end()
        return np.frombuffer(self.data, item, count, start)

    def strings(self, count: int) -> list[str]:
        if count * 8 > self.size - self.pos:  # every string has a length of 8 bytes
            raise self.fail(f"{self.reading} claims {count:,} strings, more than the file can hold.")
        data, pos, length_at = self.data, self.pos, struct.Struct("<Q").unpack_from
        items: list[bytes] = []
        try:
            for _ in range(count):
                start = pos + 8
                pos = start + length_at(data, pos)[0]
                items.append(data[start:pos])
        except (struct.error, OverflowError) as error:
            raise self.fail(f"it ends at byte {self.size:,}, inside {self.reading}.") from error
        self.pos = pos
        self.check_end()
        return [self.text(item) for item in items]

    def tensor_infos(self, count: int, metadata: Mapping[str, Any]) -> dict[str, TensorInfo]:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment % 8:
            raise self.fail(f"the key 'general.alignment' is {alignment!r}, not a multiple of 8.")
        heads = [self.tensor_head(index, count) for index in range(count)]
        data_start = -(-self.pos // alignment) * alignment
        infos: dict[str, TensorInfo] = {}
        for name, dims, type_id, offset in heads:
            if name in infos:
                raise self.fail(f"the tensor {name!r} is there twice.")
            if offset % alignment:
                raise self.fail(
                    f"tensor {name!r} starts at byte {offset} of the data, off the alignment of {alignment}."
                )
            infos[name] = self.tensor_info(name, dims, type_id, data_start + offset)
        return infos

    def tensor_head(self, index: int, count: int) -> tuple[str, tuple[int, ...], int, int]:
        """Read (name, dims in file order, type id, offset in the data)."""
        self.reading = f"the name of tensor {index} of {count}"
        name = self.string()
        self.reading = f"the entry of tensor {name!r}"
        (num_dims,) = self.unpack("I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.fail(f"tensor {name!r} has {num_dims} dimensions; 1 to {MAX_DIMS} are possible.")
        dims = self.unpack(f"{num_dims}Q")
        type_id, offset = self.unpack("IQ")
        return name, dims, type_id, offset

    def tensor_info(self, name: str, dims: tuple[int, ...], type_id: int, start: int) -> TensorInfo:
        kind = GGML_TYPES.get(type_id)
        if kind is None:
            known = ", ".join(entry.name for entry in GGML_TYPES.values())
            raise CheckpointError(f"{self.path}: tensor {name!r} has the unknown type {type_id}. Known types: {known}.")
        if min(dims) < 1 or dims[0] % kind.block_elements:
            raise self.fail(f"tensor {name!r} has the dimensions {dims}, which {kind.name} cannot hold.")
        nbytes = prod(dims) // kind.block_elements * kind.block_bytes
        if start + nbytes > self.size:
            end = start + nbytes
            raise self.fail(f"tensor {name!r} ends at byte {end:,}, after the file's end at {self.size:,}.")
        return TensorInfo(name, dims[::-1], kind, start, nbytes)
