"""DecoderKernel: layers that run one after the other in one call of the library (csrc/stack.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from core.contracts import AttentionBackend
from core.errors import CoreError
from core.kernel_contracts import HeadParts, LayerParts
from core.reach import Reach
from core_cpu_kernels.attention import CpuKernelAttention, attention_error
from core_cpu_kernels.attention_calls import LayerView
from core_cpu_kernels.elementwise import GateKernel, NormKernel
from core_cpu_kernels.kernels import KernelFunction
from core_cpu_kernels.library import Library

PARTS = ("linears", "attention", "small")  # csrc/stack.h's StackPart


class StackLayer(ctypes.Structure):
    """csrc/stack.h's `StackLayer`, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "output", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm", "attention")),
        ("step", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("attention_eps", "mlp_eps", "q_eps", "k_eps")),
        ("activation", ctypes.c_int32),
    ]


class StackCall(ctypes.Structure):
    """csrc/stack.h's `StackCall`, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "cosines", "sines", "steps", "seconds")),
        *((name, ctypes.c_int64) for name in ("tokens", "hidden", "angle_stride", "first", "last")),
        *((name, ctypes.c_void_p) for name in ("head", "head_norm", "logits")),
        ("head_eps", ctypes.c_float),
        ("row_count", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
    ]


def make_stack(library: Library, layers: Sequence[LayerParts], head: HeadParts | None) -> DecoderKernel | None:
    """Return the kernel of these layers; None if a part of one is not as the library can run it."""
    if not layers or not all(_can_run(library, parts) for parts in layers):
        return None
    widths = {parts.output.out_features for parts in layers} | {parts.down.out_features for parts in layers}
    hidden = widths.pop()
    if widths:
        return None
    return DecoderKernel(library, layers, hidden, None if head is None else _end(library, head, hidden))


@dataclass(frozen=True)
class _End:
    """What follows the last layer, by this library's kernels."""

    norm: NormKernel
    head: KernelFunction


def _end(library: Library, parts: HeadParts, hidden: int) -> _End | None:
    norm, head = parts.norm, parts.head
    if not isinstance(norm, NormKernel) or not isinstance(head, KernelFunction):
        return None
    ours = norm.library is head.library is library
    return _End(norm, head) if ours and norm.width == head.in_features == hidden else None


def _can_run(library: Library, parts: LayerParts) -> bool:
    """The kernels are this library's, and their widths fit together."""
    norms = [parts.attention_norm, parts.mlp_norm, *(norm for norm in (parts.q_norm, parts.k_norm) if norm is not None)]
    linears = [*parts.qkv, parts.output, *parts.gate_up, parts.down]
    if not all(isinstance(one, NormKernel) and one.library is library for one in norms):
        return False
    if not all(isinstance(one, KernelFunction) and one.library is library for one in linears):
        return False
    return isinstance(parts.gate, GateKernel) and _fits(parts)


def _fits(parts: LayerParts) -> bool:
    hidden = parts.output.out_features
    q, kv, inner = parts.heads * parts.head_dim, parts.kv_heads * parts.head_dim, parts.down.in_features
    widths = [norm.width for norm in (parts.q_norm, parts.k_norm) if norm is not None]
    inputs = {one.in_features for one in (*parts.qkv, *parts.gate_up)} | {parts.down.out_features}
    return (
        [one.out_features for one in parts.qkv] in ([q + 2 * kv], [q, kv, kv])
        and [one.out_features for one in parts.gate_up] in ([2 * inner], [inner, inner])
        and inputs | {parts.attention_norm.width, parts.mlp_norm.width} == {hidden}
        and parts.output.in_features == q
        and all(width == parts.head_dim for width in widths)
    )


@dataclass(frozen=True)
class _Bound:
    """The layers as one attention backend knows them."""

    backend: ref[CpuKernelAttention]
    views: list[LayerView]  # the library points at them
    reaches: list[Reach]  # each once, in the order of StackLayer.step


class DecoderKernel:
    """A `core.kernel_contracts.DecoderKernel`."""

    def __init__(self, library: Library, layers: Sequence[LayerParts], hidden: int, end: _End | None) -> None:
        self._run, self._hidden, self._layers, self._end = library.stack, hidden, list(layers), end
        self.has_head = end is not None
        self._structs = (StackLayer * len(layers))(*map(_describe, layers))
        self._call = StackCall(hidden=hidden)
        if end is not None:
            self._call.head_norm, self._call.head_eps = end.norm.at, end.norm.eps
        self._at, self._call_at = ctypes.addressof(self._structs), ctypes.addressof(self._call)
        self._dims = {parts.head_dim for parts in layers}
        self._bound: _Bound | None = None
        self._seconds = (ctypes.c_double * len(PARTS))()

    def takes(self, attention: AttentionBackend) -> bool:
        return isinstance(attention, CpuKernelAttention)

    def run(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: AttentionBackend,
        first: int,
        last: int,
        logits: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        assert isinstance(attention, CpuKernelAttention)
        bound = self._bound
        if bound is None or bound.backend() is not attention:
            bound = self._bind(attention)
        self._check(x, cos, sin, attention)
        call = self._call
        steps = [attention.step_of(reach).address for reach in bound.reaches]
        call.steps = ctypes.addressof(addresses := (ctypes.c_void_p * len(steps))(*steps))
        call.x, call.cosines, call.sines = x.data_ptr(), cos.data_ptr(), sin.data_ptr()
        call.tokens, call.angle_stride, call.first, call.last = len(x), cos.stride(0), first, last
        call.head = None
        if logits is not None:
            call.head, call.logits = self._head_for(logits, len(x)), logits.data_ptr()
        wanted = None if rows is None else rows.contiguous()
        call.rows, call.row_count = (None, 0) if wanted is None else (wanted.data_ptr(), len(wanted))
        failure = self._run(attention.set, self._at, self._call_at)
        del addresses, wanted
        if failure:
            raise attention_error(failure, bound.views[first].spec)

    def _head_for(self, logits: Tensor, tokens: int) -> int:
        if self._end is None:
            raise CoreError("These layers were made without a head.")
        head = self._end.head
        plain = logits.dtype is torch.float32 and logits.is_contiguous()
        if not plain or logits.shape != (tokens, head.out_features):
            raise CoreError(f"The head fills float32 [{tokens}, {head.out_features}], not {list(logits.shape)}.")
        return head.made

    def _check(self, x: Tensor, cos: Tensor, sin: Tensor, attention: CpuKernelAttention) -> None:
        tokens = len(x)
        if tokens != attention.num_tokens:
            raise CoreError(f"The layers were given {tokens} tokens of a step of {attention.num_tokens}.")
        angles = cos.dtype is torch.float32 and sin.dtype is torch.float32 and cos.stride() == sin.stride()
        if not angles or cos.stride(-1) != 1 or {cos.shape[-1], sin.shape[-1]} != self._dims or len(cos) != tokens:
            raise CoreError(f"Layers of heads {sorted(self._dims)} wide cannot turn by {list(cos.shape)} {cos.dtype}.")
        if x.dtype is not torch.float32 or not x.is_contiguous() or x.shape[1] != self._hidden:
            raise CoreError(f"The layers take float32 [tokens, {self._hidden}], not {list(x.shape)} {x.dtype}.")

    def _bind(self, backend: CpuKernelAttention) -> _Bound:
        """Point at the backend's cache. Raises UnsupportedAttention as its `attend` does."""
        views, reaches = [], []
        for struct, parts in zip(self._structs, self._layers, strict=True):
            view = backend.layers[parts.layer].view(backend.name, *_samples(parts), parts.args)
            if view.spec.reach not in reaches:
                reaches.append(view.spec.reach)
            struct.attention, struct.step = view.address, reaches.index(view.spec.reach)
            views.append(view)
        self._bound = _Bound(ref(backend), views, reaches)
        return self._bound

    def time(self, on: bool) -> None:
        self._call.seconds = ctypes.addressof(self._seconds) if on else None

    def take_times(self) -> dict[str, float]:
        found = dict(zip(PARTS, self._seconds, strict=True))
        ctypes.memset(self._seconds, 0, ctypes.sizeof(self._seconds))
        return found

    def __deepcopy__(self, memo: Any) -> DecoderKernel:
        return self


def _samples(parts: LayerParts) -> list[Tensor]:
    """Q, K and V of one token as the library's buffers hold them: in the rows of one product, or of three."""
    sizes = [one.out_features for one in parts.qkv]
    heads = (parts.heads, parts.kv_heads, parts.kv_heads)
    rows = [torch.empty(1, size) for size in sizes]
    if len(rows) == 1:
        rows = list(rows[0].split([count * parts.head_dim for count in heads], -1))
    stride = [size if len(sizes) == 3 else sizes[0] for size in (sizes if len(sizes) == 3 else sizes * 3)]
    return [
        row.as_strided((1, count, parts.head_dim), (step, parts.head_dim, 1))
        for row, count, step in zip(rows, heads, stride, strict=True)
    ]


def _describe(parts: LayerParts) -> StackLayer:
    q, k, v = [one.made for one in parts.qkv] if len(parts.qkv) == 3 else (parts.qkv[0].made, None, None)
    gate, up = [one.made for one in parts.gate_up] if len(parts.gate_up) == 2 else (parts.gate_up[0].made, None)
    struct = StackLayer(q=q, k=k, v=v, output=parts.output.made, gate=gate, up=up, down=parts.down.made)
    for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm"):
        norm = getattr(parts, name)
        if norm is not None:
            setattr(struct, name, norm.at)
            setattr(struct, f"{name.removesuffix('_norm')}_eps", norm.eps)
    struct.activation = parts.gate.kind
    return struct
