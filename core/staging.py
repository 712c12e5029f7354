"""A step's inputs on their way to the device: many small tensors, one buffer, one copy.

buffer   [token_ids | positions | logit_rows | slots | block_tables | ...]      each part starts at a multiple of 16
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.batch import Batch, Places
from core.device import DeviceModule

ALIGNMENT = 16  # bytes: kernels are compiled for inputs that begin there


@dataclass(frozen=True)
class Part:
    """Where one tensor lies in a buffer."""

    start: int  # byte
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def of(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.end].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layout:
    """Where the tensors of one step lie in a buffer of `size` bytes."""

    parts: tuple[Part, ...]
    size: int

    @classmethod
    def like(cls, tensors: Sequence[Tensor]) -> Layout:
        parts: list[Part] = []
        size = 0
        for tensor in tensors:
            part = Part(size, tuple(tensor.shape), tensor.dtype)
            parts.append(part)
            size = -(-part.end // ALIGNMENT) * ALIGNMENT
        return cls(tuple(parts), size)

    def views(self, buffer: Tensor) -> list[Tensor]:
        return [part.of(buffer) for part in self.parts]

    def pack(self, tensors: Sequence[Tensor], device: DeviceModule) -> Tensor:
        """Return the tensors in one buffer of the host. Raises ValueError if one has another shape than its part."""
        buffer = device.host_buffer(self.size)
        for part, tensor in zip(self.parts, tensors, strict=True):
            if (tuple(tensor.shape), tensor.dtype) != (part.shape, part.dtype):
                raise ValueError(f"{tuple(tensor.shape)} of {tensor.dtype} does not fit {part}.")
            part.of(buffer).copy_(tensor)
        return buffer


def to_device(tensors: Sequence[Tensor], device: DeviceModule) -> list[Tensor]:
    """Copy the host's tensors to the device, all in one piece."""
    layout = Layout.like(tensors)
    buffer = device.buffer(layout.size)
    device.copy(layout.pack(tensors, device), buffer)
    return layout.views(buffer)


def tensors_of(batch: Batch) -> list[Tensor]:
    """Return the tensors of a batch, in the order in which `with_tensors` takes them."""
    found = [batch.token_ids, batch.positions, batch.logit_rows]
    for places in (batch.everything, *batch.windows.values()):
        found += [places.slots, places.block_tables, *([] if places.fresh is None else [places.fresh])]
    return found


def with_tensors(batch: Batch, tensors: Iterator[Tensor]) -> Batch:
    """Return the batch with other tensors; takes as many as `tensors_of` gave."""
    token_ids, positions, logit_rows = next(tensors), next(tensors), next(tensors)
    everything = _places(batch.everything, tensors)
    windows = {reach: _places(places, tensors) for reach, places in batch.windows.items()}
    return replace(
        batch,
        token_ids=token_ids,
        positions=positions,
        logit_rows=logit_rows,
        everything=everything,
        windows=windows,
    )


def _places(like: Places, tensors: Iterator[Tensor]) -> Places:
    return Places(next(tensors), next(tensors), None if like.fresh is None else next(tensors))
