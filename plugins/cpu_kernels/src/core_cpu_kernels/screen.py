"""ScreenKernel: the highest output of each row, without a float product of the whole weight (csrc/screen.h)."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core.layers.huge_pages import empty_on_huge_pages
from core_cpu_kernels.library import Library

if TYPE_CHECKING:
    from core_cpu_kernels.kernels import KernelFunction

STEP = 16  # columns: csrc/screen_calls.h's SCREEN_STEP
MOST_COLUMNS = 1 << 16  # sums of products stay below 2^31
LEAST_NUMBERS = 1 << 22  # of a weight that is worth a copy
MOST_ROWS = 64  # of x, up to which it is worth it


class ScreenWeight(ctypes.Structure):
    """csrc/screen_calls.h's `ScreenWeight`, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("out", "in_")),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "rests", "lengths", "code_length", "bias")),
        ("longest", ctypes.c_float),
    ]


class ScreenKernel:
    """x [..., in] -> [..., out]. Keeps a copy of the weight in bytes: a quarter of one in float32."""

    def __init__(self, library: Library, linear: KernelFunction, width: int) -> None:
        self.linear, self._highest = linear, library.highest
        out, columns = linear.out_features, linear.in_features
        blocks = -(-out // width)
        self._codes = empty_on_huge_pages(blocks * width * columns)
        self._numbers = {name: torch.empty(blocks * width) for name in ("scales", "rests", "lengths")}
        self._numbers["code_length"] = torch.empty(blocks)
        pointers = {name: part.data_ptr() for name, part in self._numbers.items()}
        self._weight = ScreenWeight(out=out, in_=columns, codes=self._codes.data_ptr(), **pointers)
        self._at = ctypes.addressof(self._weight)
        library.screen_fill(self._at, linear.made)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.linear.in_features
        if x.dtype is not torch.float32 or not 0 < rows <= MOST_ROWS or x.shape[-1] != self.linear.in_features:
            return self.linear(x)
        x = x.detach().contiguous()
        out = x.new_empty((*x.shape[:-1], self.linear.out_features))
        if self._highest(self._at, self.linear.made, x.data_ptr(), out.data_ptr(), rows):
            raise MemoryError(f"no memory for the activations {list(x.shape)}")
        return out

    def __deepcopy__(self, memo: Any) -> ScreenKernel:
        return self


def make_screen(library: Library, linear: KernelFunction) -> ScreenKernel | None:
    """Return the screen of a linear over floats; None where it is not worth one or there is no code for it."""
    out, columns = linear.out_features, linear.in_features
    worth = linear.has_floats and out * columns >= LEAST_NUMBERS
    if not worth or not library.screen_width or columns % STEP or columns > MOST_COLUMNS:
        return None
    return ScreenKernel(library, linear, library.screen_width)
