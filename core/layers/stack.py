"""Decoder layers that a device's kernels run in one call, and when they have to run one by one all the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from core.kernel_contracts import HeadParts, LayerParts
from core.layers.attention import Attention
from core.layers.linear import MergedLinear
from core.layers.mlp import GatedMLP
from core.layers.norm import RMSNorm
from core.layers.rotary import Rotary

if TYPE_CHECKING:
    from core.contracts import AttentionBackend
    from core.kernel_contracts import DecoderKernel, LinearKernel


class LayerStack:
    """Modules of layers that follow each other, and the kernel of all of them and of what follows the last."""

    def __init__(self, kernel: DecoderKernel, layers: Sequence[nn.Module], after: Sequence[nn.Module] = ()) -> None:
        self.kernel, self.count = kernel, len(layers)
        parts = [part for layer in (*layers, *after) for part in layer.modules()]
        self._hooks = [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]

    @property
    def is_hooked(self) -> bool:
        """True while somebody looks at what goes in or out of a layer or a part of one."""
        return any(self._hooks)

    def run(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention: AttentionBackend | None,
        logits: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> bool:
        """Add to x [tokens, hidden], in place, what the layers make of it; fill `logits`, if given, for every token.

        `rows` [n], int64, ascending: nobody will look at other rows of x, which may be left unfinished; None: all.

        False, with nothing done, where they have to run one by one: they are looked at, x is not float32, or the
        attention backend is not the kernel's own.
        """
        if attention is None or x.dtype is not torch.float32 or not self.takes(attention):
            return False
        self.kernel.run(x, *rotation, attention, 0, self.count, logits, rows)
        return True

    def takes(self, attention: AttentionBackend | None) -> bool:
        """True if a step in float32 runs in one call."""
        return attention is not None and not self.is_hooked and self.kernel.takes(attention)


@dataclass(frozen=True)
class LayerNorms:
    """The norms of one layer; those by head are optional."""

    attention: RMSNorm
    mlp: RMSNorm
    q: RMSNorm | None
    k: RMSNorm | None


@dataclass(frozen=True)
class LayerLinears:
    """The linears of one layer, packed."""

    qkv: nn.Module
    output: nn.Module
    gate_up: nn.Module
    down: nn.Module


def layer_parts(
    norms: LayerNorms, linears: LayerLinears, mlp: GatedMLP, rotary: Rotary, attention: Attention, heads: int
) -> LayerParts | None:
    """Return a layer of this package's modules by its kernels; None where one of them has none."""
    qkv, output, gate_up, down = map(kernels_of, (linears.qkv, linears.output, linears.gate_up, linears.down))
    before, between, gate = norms.attention.kernel, norms.mlp.kernel, mlp.kernel
    by_head = [None if norm is None else norm.kernel for norm in (norms.q, norms.k)]
    if not qkv or not output or not gate_up or not down or before is None or between is None or gate is None:
        return None
    if torch.float32 not in rotary.kernels or [norms.q is None, norms.k is None] != [one is None for one in by_head]:
        return None
    spec = attention.spec
    return LayerParts(
        attention_norm=before,
        qkv=qkv,
        heads=heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.k_dim,
        q_norm=by_head[0],
        k_norm=by_head[1],
        layer=attention.layer,
        args=attention.args,
        output=output[0],
        mlp_norm=between,
        gate_up=gate_up,
        gate=gate,
        down=down[0],
    )


def head_parts(norm: RMSNorm, head: nn.Module) -> HeadParts | None:
    """Return what follows the last layer by its kernels; None where one of them has none."""
    linears = kernels_of(head)
    return HeadParts(norm.kernel, linears[0]) if norm.kernel is not None and len(linears) == 1 else None


def kernels_of(linear: nn.Module) -> list[LinearKernel]:
    """Return the kernels that a linear multiplies with, several where it stayed in parts; [] if one is missing."""
    parts = linear.parts if isinstance(linear, MergedLinear) and linear.parts is not None else [linear]
    found: list[LinearKernel | None] = [getattr(part, "kernel", None) for part in parts]
    return [] if None in found else [kernel for kernel in found if kernel is not None]
