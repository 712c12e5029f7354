"""Weights of a CPU on huge pages, one after the other in the order in which a step reads them.

With pages of 4 KiB the processor looks up an address every 64 lines, and stops reading ahead there. In a virtual
machine of two Zen 4 cores a thread read weights at 17 GB/s so, and at 26 GB/s from pages of 2 MiB.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from core.layers.quantized import QuantizedTensor
from core.memory import trim

HUGE_PAGE = 2 << 20  # bytes
CHUNK = 32 * HUGE_PAGE  # of memory that is asked for at once; only what is written to is ever taken
LEAST = 1 << 17  # bytes of a tensor that is worth moving
LARGE = 16 << 20  # bytes of a tensor
AT_ONCE = 8 << 20  # bytes that are moved before the memory that they took is let go
LINE = 64
MADV_COLLAPSE = 25  # Linux 6.1: puts a range on huge pages where it is, one after the other
CAN_ASK = hasattr(mmap, "MADV_HUGEPAGE")  # Linux


class HugePages:
    """Memory for one model's weights. It is freed with the last tensor of it."""

    def __init__(self, let_go: Callable[[], None] = trim) -> None:
        """`let_go` is called time and again for what the weights took where they were."""
        self._let_go = let_go
        self._free = torch.empty(0, dtype=torch.uint8)
        self._moved_bytes = 0  # since memory was let go

    def place(self, weight: Tensor) -> None:
        """Move a weight's memory here, in place: whoever shares the weight finds the same numbers there."""
        if isinstance(weight, QuantizedTensor):
            for name, part in weight.parts.items():
                weight.parts[name] = self._moved(part)
        elif type(weight) in (Tensor, torch.nn.Parameter):
            weight.data = self._moved(weight.data)

    def _moved(self, tensor: Tensor) -> Tensor:
        if not CAN_ASK or tensor.device.type != "cpu" or tensor.nbytes < LEAST or not tensor.is_contiguous():
            return tensor
        if tensor.nbytes >= LARGE and _collapsed(tensor):  # a second copy of it would be felt
            return tensor
        size = -(-tensor.nbytes // LINE) * LINE
        if size > len(self._free):
            self._free = _mapped(max(size, CHUNK))
        memory, self._free = self._free[: tensor.nbytes], self._free[size:]
        moved = memory.view(tensor.dtype).view(tensor.shape)
        self._copy(tensor.reshape(-1), moved.view(-1))
        return moved

    def _copy(self, numbers: Tensor, to: Tensor) -> None:
        """Copy a piece at a time: what was read of a file that is mapped can go before the rest is read."""
        count = AT_ONCE // numbers.element_size()
        for start in range(0, len(numbers), count):
            piece = numbers[start : start + count]
            to[start : start + count].copy_(piece)
            self._moved_bytes += piece.nbytes
            if self._moved_bytes >= AT_ONCE:
                self._let_go()
                self._moved_bytes = 0


def empty_on_huge_pages(size: int) -> Tensor:
    """Return memory for `size` bytes, uint8, on huge pages where the system has them."""
    return _mapped(size) if CAN_ASK else torch.empty(size, dtype=torch.uint8)


def _mapped(size: int) -> Tensor:
    """Return memory that begins on a huge page."""
    whole = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: the pages are small ones, and all else is the same
        whole.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(whole, dtype=torch.uint8)
    skipped = -memory.data_ptr() % HUGE_PAGE
    return memory[skipped : skipped + size]


def _collapsed(tensor: Tensor) -> bool:
    """Put a tensor's memory on huge pages in place; False if the system cannot."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    begin, end = -(-begin // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    return int(madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_COLLAPSE)) == 0
