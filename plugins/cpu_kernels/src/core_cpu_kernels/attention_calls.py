"""What the library is told of a layer and of a step: the structures of csrc/attention.h, and who keeps them filled."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from core.attention.interface import check_call, lazy_zeros
from core.batch import Places
from core.contracts import AttentionArgs, KVSpec
from core.errors import UnsupportedAttention

TYPES = {torch.float16: 2, torch.bfloat16: 3, torch.float32: 4}  # weight.h's FloatType
CACHE_TAIL = 16  # elements that the library may read behind the last block
PAGE, LINE = 4096, 64  # bytes
HONOURS = frozenset({"window", "chunk", "softcap", "sinks", "bias"})


class LayerStruct(ctypes.Structure):
    """csrc/attention.h's `AttentionLayer`, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("cache", "sinks", "slopes")),
        *((name, ctypes.c_int64) for name in ("num_blocks", "block_size", "block_stride")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "k_dim", "v_dim")),
        *((name, ctypes.c_int64) for name in ("window", "chunk")),
        *((name, ctypes.c_int64) for name in ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
        *((name, ctypes.c_int32) for name in ("q_type", "k_type", "v_type", "cache_type")),
    ]


class StepStruct(ctypes.Structure):
    """csrc/attention.h's `AttentionStep`, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("slots", "tables", "query_starts", "context_lens")),
        *((name, ctypes.c_int64) for name in ("table_width", "requests", "checked")),
    ]


@dataclass(frozen=True)
class StepCall:
    """One step as layers of one reach see it."""

    struct: StepStruct
    address: int
    kept: tuple[Tensor, ...]  # what the structure points at


def make_step(places: Places, query_starts: Tensor, context_lens: Tensor) -> StepCall:
    """query_starts [requests + 1] and context_lens [requests], int64."""
    slots, tables = places.slots.contiguous(), places.block_tables.contiguous()
    struct = StepStruct(
        slots=slots.data_ptr(),
        tables=tables.data_ptr(),
        query_starts=query_starts.data_ptr(),
        context_lens=context_lens.data_ptr(),
        table_width=tables.shape[1],
        requests=tables.shape[0],
    )
    return StepCall(struct, ctypes.addressof(struct), (slots, tables, query_starts, context_lens))


@dataclass(frozen=True)
class LayerView:
    """One layer for a caller whose calls are all alike: checked and described once."""

    spec: KVSpec
    struct: LayerStruct
    address: int
    kept: tuple[Tensor | None, ...]  # what the structure points at


@dataclass(frozen=True)
class CachePlace:
    """Where a layer's K and V lie; offset and stride count elements."""

    memory: Tensor
    num_blocks: int
    offset: int  # of the first block
    block_stride: int


def cache_places(specs: Sequence[KVSpec], num_blocks: Sequence[int], block_size: int) -> list[CachePlace]:
    """Allocate the K/V of all layers, those with as many blocks together: block after block, in each layer after layer.

    So a text takes the memory of its blocks and at most one page more; in a cache of its own each layer would take that
    page, and huge pages are as large as the K/V of hundreds of tokens.
    """
    groups: dict[tuple[int, torch.dtype], list[int]] = {}
    for index, (spec, count) in enumerate(zip(specs, num_blocks, strict=True)):
        groups.setdefault((count, spec.dtype), []).append(index)
    found: dict[int, CachePlace] = {}
    for (count, dtype), members in groups.items():
        unit = LINE // dtype.itemsize
        sizes = [block_size * specs[i].num_kv_heads * (specs[i].k_dim + specs[i].v_dim) for i in members]
        ends = list(accumulate(-(-size // unit) * unit for size in sizes))
        memory = _aligned_zeros(count * ends[-1] + CACHE_TAIL, dtype)
        for index, offset in zip(members, [0, *ends], strict=False):
            found[index] = CachePlace(memory, count, offset, ends[-1])
    return [found[index] for index in range(len(specs))]


class LayerCall:
    """One layer: its part of the cache, and what is known of its calls, so that a like one is checked at a glance."""

    def __init__(self, spec: KVSpec, place: CachePlace, block_size: int) -> None:
        self.spec, self.cache = spec, place.memory
        self.struct = LayerStruct(
            cache=place.memory.data_ptr() + place.offset * spec.dtype.itemsize,
            num_blocks=place.num_blocks,
            block_size=block_size,
            block_stride=place.block_stride,
            kv_heads=spec.num_kv_heads,
            k_dim=spec.k_dim,
            v_dim=spec.v_dim,
            cache_type=TYPES[spec.dtype],
        )
        self.address = ctypes.addressof(self.struct)
        self.facts: tuple[object, ...] = ()
        self.args: AttentionArgs | None = None
        self._kept: tuple[Tensor | None, ...] = ()  # what the structure points at

    def prepare(
        self, backend: str, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs, facts: tuple[object, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Check a call that differs from the one before it, and describe it. Returns q, k, v as the library takes them.

        Raises UnsupportedAttention.
        """
        self.args = None
        check_call(backend, HONOURS, self.spec, q, k, v, args)
        self._check_tensors(q, k, v)
        dense = [_rows_dense(x) for x in (q, k, v)]
        self._kept = _describe(self.struct, dense, args, self.spec)
        if all(one is given for one, given in zip(dense, (q, k, v), strict=True)):
            self.facts, self.args = facts, args
        return dense[0], dense[1], dense[2]

    def view(self, backend: str, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> LayerView:
        """Return this layer for calls whose tensors lie like these; raises UnsupportedAttention."""
        check_call(backend, HONOURS, self.spec, q, k, v, args)
        self._check_tensors(q, k, v)
        struct = LayerStruct.from_buffer_copy(self.struct)
        kept = _describe(struct, (q, k, v), args, self.spec)
        return LayerView(self.spec, struct, ctypes.addressof(struct), (self.cache, *kept))

    def _check_tensors(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        if not len(q) == len(k) == len(v):
            raise UnsupportedAttention(
                f"Layer {self.spec.name} was given {len(q)} queries, {len(k)} keys and {len(v)} values; one of each a "
                f"token is wanted."
            )
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dtype not in TYPES or x.device.type != "cpu":
                raise UnsupportedAttention(
                    f"Layer {self.spec.name} was given {name} in {x.dtype} on {x.device}; this backend takes float32, "
                    f"bfloat16 and float16 on the CPU."
                )


def _describe(
    struct: LayerStruct, tensors: Sequence[Tensor], args: AttentionArgs, spec: KVSpec
) -> tuple[Tensor | None, ...]:
    """Enter how Q, K and V lie and what is asked for; return what the structure points at from now on."""
    for name, x in zip("qkv", tensors, strict=True):
        setattr(struct, f"{name}_token", x.stride(0))
        setattr(struct, f"{name}_head", x.stride(1))
        setattr(struct, f"{name}_type", TYPES[x.dtype])
    struct.heads = tensors[0].shape[1]
    struct.scaling, struct.softcap = args.scaling, args.softcap or 0.0
    struct.window, struct.chunk = args.window or 0, args.chunk or 0
    sinks, slopes = (_flat(x, struct.heads, spec) for x in (args.sinks, args.bias))
    struct.sinks = None if sinks is None else sinks.data_ptr()
    struct.slopes = None if slopes is None else slopes.data_ptr()
    return sinks, slopes


def _aligned_zeros(count: int, dtype: torch.dtype) -> Tensor:
    """Begin on a page: where vectors cross the lines of the processor's cache, reading takes half as long again."""
    page = PAGE // dtype.itemsize
    memory = lazy_zeros((count + page,), dtype, "cpu")
    skipped = -memory.data_ptr() % PAGE // dtype.itemsize
    return memory[skipped : skipped + count]


def _rows_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _flat(x: Tensor | None, heads: int, spec: KVSpec) -> Tensor | None:
    if x is None:
        return None
    if x.numel() != heads:
        raise UnsupportedAttention(f"Layer {spec.name} was given {x.numel()} sinks or slopes for {heads} heads.")
    return x.detach().reshape(-1).float().contiguous()
