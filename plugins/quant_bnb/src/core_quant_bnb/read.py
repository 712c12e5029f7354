"""A checkpoint of bitsandbytes as a stream of weights. Needs no bitsandbytes.

4 bit  X.weight uint8 [n / 2, 1] (or the same bytes as another dtype) · .absmax [blocks] · .quant_map [16]
       · .quant_state.bitsandbytes__nf4 (or fp4), JSON as bytes: shape, blocksize ...
       doubly quantized: .absmax are bytes of their own, with .nested_absmax and .nested_quant_map [256]
8 bit  X.weight int8 [out, in] · X.SCB [out], the rows' largest magnitudes · X.weight_format, 0 for plain rows
What has none of these is a float: modules that llm_int8_skip_modules names, norms, biases.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from core.contracts import Checkpoint
from core.errors import CheckpointError
from core.layers import QuantizedTensor
from core.quant_weights import as_its_module_has_it, located, read_part, read_scales
from core_quant_bnb import four_bit, int8

WEIGHT = ".weight"
STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
FOUR_BIT_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *(STATE + kind for kind in KINDS))
INT8_PARTS = (".SCB", ".weight_format")


def read_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every (name, tensor) under a float checkpoint's names. Raises CheckpointError naming file and tensor."""
    names = checkpoint.tensor_names()
    parts = _parts_by_weight(checkpoint, names)
    helpers = {name for owned in parts.values() for name in owned.values()}
    for name in names:
        if name not in helpers:
            yield name, _read(checkpoint, name, parts.get(name, {}), dtype)


def _parts_by_weight(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return weight -> suffix -> name of the tensor. Raises CheckpointError for a part whose weight is not there."""
    present = set(names)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        owner = _owner(name)
        if owner is None:
            continue
        weight, suffix = owner
        if weight not in present:
            raise CheckpointError(f"{located(checkpoint, name)} belongs to {weight!r}, which is missing.")
        found.setdefault(weight, {})[suffix] = name
    return found


def _owner(name: str) -> tuple[str, str] | None:
    """Return the weight that a tensor of the format belongs to, and which part it is."""
    for suffix in FOUR_BIT_PARTS:
        if name.endswith(WEIGHT + suffix):
            return name.removesuffix(suffix), suffix
    for suffix in INT8_PARTS:
        if name.endswith(suffix):
            return name.removesuffix(suffix) + WEIGHT, suffix
    return None


def _read(checkpoint: Checkpoint, name: str, parts: Mapping[str, str], dtype: torch.dtype) -> Tensor:
    weight = checkpoint.tensor(name)
    if any(suffix in parts for suffix in INT8_PARTS) or weight.dtype == torch.int8:
        made = _read_int8(checkpoint, name, weight, parts, dtype)
    elif parts or weight.dtype == torch.uint8:
        made = _read_four_bit(checkpoint, name, weight, parts, dtype)
    else:
        return weight
    made = made if isinstance(made, QuantizedTensor) else made.to(dtype=dtype)
    return as_its_module_has_it(checkpoint.spec, made)


def _part(checkpoint: Checkpoint, weight: str, parts: Mapping[str, str], suffix: str, shape: Sequence[int]) -> Tensor:
    if suffix not in parts:
        base = weight if suffix in FOUR_BIT_PARTS else weight.removesuffix(WEIGHT)
        raise CheckpointError(f"{located(checkpoint, weight)} is quantized, but {base + suffix!r} is missing.")
    read = read_part if suffix == ".absmax" else read_scales  # the former may be quantized themselves
    return read(checkpoint, parts[suffix], shape)


# ------------------------------------------------------------------------------------------------ int8


def _read_int8(
    checkpoint: Checkpoint, name: str, weight: Tensor, parts: Mapping[str, str], dtype: torch.dtype
) -> Tensor:
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise CheckpointError(
            f"{located(checkpoint, name)} is {weight.dtype} {list(weight.shape)}; int8 of two dimensions is right."
        )
    absmax = _part(checkpoint, name, parts, ".SCB", [len(weight)])
    order = checkpoint.tensor(parts[".weight_format"]) if ".weight_format" in parts else torch.zeros(1)
    if bool((order != 0).any()):
        raise CheckpointError(
            f"{located(checkpoint, name)} lies in an order for one kind of GPU (weight_format). Save it again with "
            "bitsandbytes 0.45 or newer."
        )
    return int8.make_tensor(weight, absmax.float(), dtype)


# ------------------------------------------------------------------------------------------------ 4 bit


@dataclass(frozen=True)
class State:
    """What the JSON beside a 4-bit weight says."""

    kind: str
    shape: tuple[int, int]  # out, in
    block: int
    nested_block: int | None  # None: absmax is plain
    nested_offset: float

    @property
    def count(self) -> int:
        return prod(self.shape)


def _read_four_bit(
    checkpoint: Checkpoint, name: str, weight: Tensor, parts: Mapping[str, str], dtype: torch.dtype
) -> Tensor:
    state = _state(checkpoint, name, parts)
    table = _part(checkpoint, name, parts, ".quant_map", [16]).float()
    packed = weight.contiguous().view(-1).view(torch.uint8)
    if len(packed) != -(-state.count // 2):
        raise CheckpointError(
            f"{located(checkpoint, name)} holds {len(packed):,} bytes, but its quant_state says {list(state.shape)}, "
            f"which is {-(-state.count // 2):,}."
        )
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)[: state.count].view(state.shape)
    return four_bit.make_tensor(codes, _absmax(checkpoint, name, parts, state), table, state.block, dtype)


def _state(checkpoint: Checkpoint, name: str, parts: Mapping[str, str]) -> State:
    kinds = [kind for kind in KINDS if STATE + kind in parts]
    if len(kinds) != 1:
        problem = "two quant_states" if kinds else f"no {name + STATE + KINDS[0]!r} (or {KINDS[1]}) beside it"
        raise CheckpointError(f"{located(checkpoint, name)} is quantized, but has {problem}.")
    stored = parts[STATE + kinds[0]]
    try:
        found = json.loads(bytes(checkpoint.tensor(stored).flatten().tolist()))
        return _checked_state(kinds[0], found)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{located(checkpoint, stored)} does not describe a matrix: {type(error).__name__}: {error}"
        ) from error


def _checked_state(kind: str, found: Mapping[str, Any]) -> State:
    """Raises KeyError, TypeError or ValueError if the entries are not what bitsandbytes writes."""
    rows, columns = map(int, found["shape"])
    nested = "nested_blocksize" in found
    state = State(
        kind=str(found["quant_type"]),
        shape=(rows, columns),
        block=int(found["blocksize"]),
        nested_block=int(found["nested_blocksize"]) if nested else None,
        nested_offset=float(found["nested_offset"]) if nested else 0.0,
    )
    sizes = (rows, columns, state.block, 1 if state.nested_block is None else state.nested_block)
    if state.kind != kind or min(sizes) < 1:
        raise ValueError(f"quant_type {state.kind!r}, sizes {sizes}")
    return state


def _absmax(checkpoint: Checkpoint, name: str, parts: Mapping[str, str], state: State) -> Tensor:
    """Return the blocks' scales, float32; where they are quantized themselves, as bitsandbytes computes them."""
    blocks = -(-state.count // state.block)
    if state.nested_block is None and ".absmax" in parts:
        return read_scales(checkpoint, parts[".absmax"], [blocks]).float()
    absmax = _part(checkpoint, name, parts, ".absmax", [blocks])
    if absmax.dtype != torch.uint8:
        raise CheckpointError(f"{located(checkpoint, parts['.absmax'])} is {absmax.dtype}; nested scales are uint8.")
    table = _part(checkpoint, name, parts, ".nested_quant_map", [256]).float()
    largest = _part(checkpoint, name, parts, ".nested_absmax", [-(-blocks // state.nested_block)]).float()
    owner = torch.arange(blocks) // state.nested_block
    return table[absmax.int()] * largest[owner] + state.nested_offset
