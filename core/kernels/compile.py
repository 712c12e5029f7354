"""Compile one launch for a chip that need not be here, and read from the machine code whether it fits the chip.

NVIDIA: ptxas makes the cubin, cuobjdump and nvdisasm (both come with Triton) read registers, stack and instructions.
AMD: LLVM makes the code object; its metadata and assembly say the same.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from core.errors import KernelError
from core.kernels.chip import INTERPRETED, Launch, Target

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
DIVISIBLE = [["tt.divisibility", 16]]
TENSOR_CORES = {"cuda": r"\b(?:[HIQDB]?MMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)\b", "hip": r"\bv_s?mfma_\w+"}
WIDE_LOADS = {
    "cuda": r"\b(?:LDG|LDGSTS)\.[\w.]*(?:128|256)\b|\bUTMALDG|\bUBLKCP",
    "hip": r"\b(?:global|buffer|flat)_load_(?:dwordx4|lds_dwordx4|b128)\b",
}
SPILLS = r"\b(?:STL|LDL)\b"


@dataclass(frozen=True)
class Compiled:
    """What one launch became on one chip."""

    registers: int  # of a thread
    spills: int  # bytes of a thread's stack, or registers spilled
    shared_memory: int  # bytes of a program
    tensor_cores: int  # matrix instructions
    wide_loads: int  # loads of 16 bytes or more from global memory


def ast_source(launch: Launch) -> ASTSource:
    """Return the source with its arguments specialised as a launch would: 1 and None are constants, 16 divides."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.args[parameter.name]
        if parameter.is_constexpr or value is None:
            kind = "constexpr"
        else:
            kind = _type_of(value, parameter)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif isinstance(value, Tensor) or (kind[0] == "i" and not parameter.do_not_specialize and value % 16 == 0):
            attributes[(index,)] = DIVISIBLE
    return ASTSource(launch.kernel, signature, constants, attributes)


def _type_of(value: Any, parameter: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile for `target`. Raises whatever Triton raises; KernelError in a process that interprets."""
    if INTERPRETED:
        raise KernelError("Kernels cannot be compiled in a process with TRITON_INTERPRET=1; unset it.")
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    compiled = triton.compile(ast_source(launch), target=gpu, options=launch.options(target))
    if target.backend == "cuda":
        return _read_cubin(compiled.asm["cubin"], compiled.metadata.shared)
    return _read_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)


def _read_cubin(cubin: bytes, shared: int) -> Compiled:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _output(tools / "cuobjdump", "-res-usage", file)
        code = _output(tools / "nvdisasm", "-c", file)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    spilled = bool(re.search(SPILLS, code))
    return Compiled(
        registers=found["REG"],
        spills=max(found["STACK"] + found["LOCAL"], int(spilled)),
        shared_memory=shared,
        tensor_cores=len(re.findall(TENSOR_CORES["cuda"], code)),
        wide_loads=len(re.findall(WIDE_LOADS["cuda"], code)),
    )


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _read_amdgcn(code: str, shared: int) -> Compiled:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        return int(found[1]) if found else 0

    return Compiled(
        registers=number("vgpr_count"),  # accumulation registers included
        # Scalar registers that are parked in lanes of vector registers never reach memory.
        spills=number("vgpr_spill_count") + number("private_segment_fixed_size"),
        shared_memory=max(shared, number("group_segment_fixed_size")),
        tensor_cores=len(re.findall(TENSOR_CORES["hip"], code)),
        wide_loads=len(re.findall(WIDE_LOADS["hip"], code)),
    )


def key_of(launch: Launch) -> Mapping[str, Any]:
    """Return what makes two launches the same machine code."""
    source = ast_source(launch)
    return {
        "kernel": source.name,
        "signature": tuple(source.signature.items()),
        "constants": tuple(source.constants.items()),
        "attributes": tuple(source.attrs),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "fuses": launch.fuses,
        "all_registers": launch.all_registers,
    }
