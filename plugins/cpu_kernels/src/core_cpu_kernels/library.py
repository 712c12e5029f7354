"""The compiled library: where it lies, its functions, and the threads that it borrows from torch.

It is plain C behind ctypes: one file serves every version of Python and torch.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from core.errors import PluginError

ABI = 5
ISA_VARIABLE = "CORE_CPU_KERNELS_ISA"  # one of these instead of the best that the machine has
INSTRUCTION_SETS = ("amx", "avx512vnni", "avx512", "avx2", "plain")  # the best first


_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # result, arguments
    "instruction_set": (_POINTER, ctypes.c_char_p),
    "name": (ctypes.c_char_p, _POINTER),
    "make": (_POINTER, _POINTER, _POINTER),
    "free": (None, _POINTER),
    "linear": (ctypes.c_int32, _POINTER, _POINTER, _POINTER, _INT),
    "rms_norm": (None, *[_POINTER] * 6, *[_INT] * 2, ctypes.c_float),
    "gate": (None, *[_POINTER] * 4, *[_INT] * 4, ctypes.c_int32),
    "rotate": (None, *[_POINTER] * 4, *[_INT] * 6),
    "attention_set": (_POINTER, _POINTER),
    "attend": (ctypes.c_int32, *[_POINTER] * 7),
    "stack": (ctypes.c_int32, *[_POINTER] * 4),
    "screen_width": (_INT, _POINTER),
    "screen_fill": (None, *[_POINTER] * 3),
    "highest": (ctypes.c_int32, *[_POINTER] * 5, _INT),
    "threads": (None, _POINTER, _POINTER),
}


class Weight(ctypes.Structure):
    """csrc/weight.h's `Weight`, field by field."""

    _fields_ = [
        ("out", ctypes.c_int64),
        ("in_", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("packing", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("extra_type", ctypes.c_int32),
    ]


class Library:
    """The functions of the compiled library, for one instruction set."""

    def __init__(self, instruction_set: str = "") -> None:
        """Raises PluginError if there is no library, or the machine has no such instruction set."""
        self._functions = _load()
        self._set = self._functions.core_kernels_instruction_set(instruction_set.encode())
        if not self._set:
            raise PluginError(
                f"{ISA_VARIABLE}={instruction_set}: this machine, or this build, has no such instruction set. "
                f"Known: {', '.join(INSTRUCTION_SETS)}."
            )
        self.instruction_set: str = self._functions.core_kernels_name(self._set).decode()
        self.linear = self._functions.core_kernels_linear  # (made, x, out, rows) -> 0
        self.free = self._functions.core_kernels_free
        self.rms_norm = partial(self._functions.core_kernels_rms_norm, self._set)
        self.gate = partial(self._functions.core_kernels_gate, self._set)
        self.rotate = partial(self._functions.core_kernels_rotate, self._set)
        self.attend = self._functions.core_kernels_attend  # (attention_set, layer, step, q, k, v, out) -> 0
        self.stack = partial(self._functions.core_kernels_stack, self._set)  # (attention_set, layers, call) -> 0
        self.screen_width: int = self._functions.core_kernels_screen_width(self._set)
        self.screen_fill = partial(self._functions.core_kernels_screen_fill, self._set)  # (screen, made)
        self.highest = partial(self._functions.core_kernels_highest, self._set)  # (screen, made, x, out, rows) -> 0
        self.attention_set: int = self._functions.core_kernels_attention_set(self._set)

    def make(self, weight: Weight) -> int | None:
        """Return what `linear` takes, or None if there is no kernel for this weight."""
        made: int | None = self._functions.core_kernels_make(self._set, ctypes.byref(weight))
        return made


def instruction_sets() -> list[str]:
    """Return the names of those that this machine and this build have, the best first."""
    find = _load().core_kernels_instruction_set
    return [name for name in INSTRUCTION_SETS if find(name.encode())]


def wanted_instruction_set() -> str:
    return os.environ.get(ISA_VARIABLE, "")


def library_path() -> Path:
    """Return the compiled file beside this one. Raises PluginError if it was not built."""
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (folder / f"_kernels{suffix}").exists():
            return folder / f"_kernels{suffix}"
    raise PluginError(
        f"The compiled library of core-serve-cpu-kernels is not in {folder}. Install it again where there is a C++ "
        f"compiler (pip install --force-reinstall core-serve-cpu-kernels), or go on with --disable-plugin cpu_kernels."
    )


@cache
def _load() -> ctypes.CDLL:
    path = library_path()
    functions = ctypes.CDLL(str(path))
    if functions.core_kernels_abi() != ABI:
        raise PluginError(
            f"{path} was built from other sources than this package. Install core-serve-cpu-kernels again."
        )
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(functions, f"core_kernels_{name}")
        function.restype, function.argtypes = result, arguments
    functions.core_kernels_threads(*_openmp())
    return functions


def _openmp() -> tuple[int | None, int | None]:
    """Return the addresses of GOMP_parallel and omp_get_max_threads in the runtime that torch has loaded.

    A second runtime would bring a second pool of threads, and two pools on the same cores wait for each other.
    Without them (torch was built without OpenMP) the kernels run on the calling thread.
    """
    runtime = _runtime_of_torch()
    if runtime is None or not hasattr(runtime, "GOMP_parallel"):
        return None, None
    names = ("GOMP_parallel", "omp_get_max_threads")
    parallel, threads = (ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value for name in names)
    return parallel, threads


def _runtime_of_torch() -> ctypes.CDLL | None:
    torch.get_num_threads()  # the runtime is loaded, whichever file it is
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if line.count("/")}
    libraries = sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp5")))
    inside = [path for path in libraries if Path(torch.__file__).parent in Path(path).parents]
    found = (inside or libraries)[:1]
    return ctypes.CDLL(found[0]) if found else None
