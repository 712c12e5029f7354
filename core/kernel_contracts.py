"""What `provide_kernels` returns: fast code for one device, as layers of native models and of the fallback call it.

Protocols are what plugins give, dataclasses what the host tells them. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from core.contracts import AttentionArgs, AttentionBackend


class NormKernel(Protocol):
    """RMSNorm over the last dimension, for x [..., size] of the dtype that it was asked for."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def of_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return the norm of x[rows], for x [tokens, size] and rows [n] int64."""
        ...

    def add(self, x: Tensor, residual: Tensor, summed: Tensor) -> Tensor:
        """Put residual + x into `summed`, which may be `residual`, and return the norm of that; both contiguous."""
        ...


class ExpertsKernel(Protocol):
    """y[r] = x[source[r]] @ weights[e].T + bias[e] for the rows r in [starts[e], starts[e + 1]): experts of a mixture.

    x [tokens, in], starts [experts + 1] int32, source [rows] int32, or None if x holds the rows themselves
    -> [rows, out]. Nobody waits to learn what starts holds.
    """

    def __call__(self, x: Tensor, starts: Tensor, source: Tensor | None) -> Tensor: ...


class GateKernel(Protocol):
    """x [..., 2 n] -> activation(x[..., :n]) * x[..., n:], a new tensor [..., n]."""

    def __call__(self, gate_up: Tensor) -> Tensor: ...


class RotaryKernel(Protocol):
    """Turns the first `rotated` dimensions of x [tokens, heads, dim], in place, by cos and sin [tokens, 1, rotated].

    Pairs are (i, i + rotated / 2), interleaved ones (2 i, 2 i + 1). The angle of pair i stands at i and at
    i + rotated / 2. All of one dtype.
    """

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> None: ...


LinearKernel = Callable[["Tensor"], "Tensor"]  # x [..., in] -> [..., out]


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer, told by the kernels that it would call; all of them are from the same `Kernels`.

    x += output(attention(rotary(q), rotary(k), v)), with q, k, v of attention_norm(x), heads of `head_dim` for all
    x += down(gate(gate_up)), with gate_up of mlp_norm(x)
    """

    attention_norm: NormKernel
    qkv: Sequence[LinearKernel]  # one that gives Q, K and V side by side, or three
    heads: int
    kv_heads: int
    head_dim: int
    q_norm: NormKernel | None  # by head, before the rotation
    k_norm: NormKernel | None
    layer: int  # of the attention backend
    args: AttentionArgs
    output: LinearKernel
    mlp_norm: NormKernel
    gate_up: Sequence[LinearKernel]  # one that gives both side by side, or two
    gate: GateKernel
    down: LinearKernel


@dataclass(frozen=True)
class HeadParts:
    """What follows the last layer: head(norm(x)) are the logits."""

    norm: NormKernel
    head: LinearKernel


class DecoderKernel(Protocol):
    """Decoder layers in one call. Gives the numbers that its layers' kernels give when they are called one by one."""

    has_head: bool  # it can give logits, too

    def takes(self, attention: AttentionBackend) -> bool:
        """Return whether this kernel can attend in a backend's cache."""
        ...

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
        """Add to x [tokens, hidden], in place, what layers [first, last) make of it, in `attention`'s planned step.

        cos and sin [tokens, ..., head_dim] turn Q and K in halves; all float32. `logits` [tokens, vocab] is filled with
        what the head makes of every token then; None: nobody wants to know. `rows` [n], int64, ascending: only these
        rows of x are wanted, and others may lack what follows the last attention; None, as with `logits`: all are.
        Raises UnsupportedAttention, as `attention.attend` does.
        """
        ...

    def time(self, on: bool) -> None:
        """Measure what follows, or stop it; by default nothing is measured."""
        ...

    def take_times(self) -> Mapping[str, float]:
        """Return the seconds of "linears", "attention" and "small" (all else) since the last call of this."""
        ...


class Kernels(Protocol):
    """Fast code for one device. Whoever finds no kernel for a case computes it with torch.

    A kernel rounds where torch's operators one after the other round.
    """

    name: str  # shown at start, e.g. "cpu_kernels (avx512)"
    takes_float32: bool  # its `linear` beats the layouts that torch has for float32; kernels that do not say: False

    def linear(self, weight: Tensor, bias: Tensor | None) -> LinearKernel | None:
        """Return the function x [..., in] -> [..., out] for a weight [out, in]; None if there is none for its packing.

        `weight` is a plain tensor or a `core.layers.QuantizedTensor`. The function may keep the weight's parts, in the
        order given: nobody changes them. It must not keep a second copy of them.
        """
        ...

    def highest(self, linear: LinearKernel) -> LinearKernel | None:
        """Return the function x [..., in] -> [..., out] whose highest number in each row is that of `linear`, and so is
        every other as high; the rest are near what `linear` gives, and lower. `linear` is of this object's `linear`.

        It may keep a smaller copy of the weight. None where it would not be faster; kernels that do not say: None.
        """
        ...

    def experts(self, weights: Tensor, bias: Tensor | None) -> ExpertsKernel | None:
        """Return the products of plain weights [experts, out, in], by any strides, and of their bias [experts, out]."""
        ...

    def rms_norm(self, weight: Tensor, eps: float, dtype: torch.dtype) -> NormKernel | None:
        """Return x / sqrt(mean(x^2) + eps) * weight for a weight [size] that nobody changes any more.

        The quotient is rounded to the weight's dtype, float32 or `dtype`, and the product to `dtype`, which is x's.
        """
        ...

    def gate(self, activation: str, dtype: torch.dtype) -> GateKernel | None:
        """Return the product of an activation ("silu", "gelu", "gelu_tanh") and a second half."""
        ...

    def rotary(self, dtype: torch.dtype, interleaved: bool = False) -> RotaryKernel | None:
        """Return rotary embedding, in halves or of interleaved pairs."""
        ...

    def decoder(self, layers: Sequence[LayerParts], head: HeadParts | None = None) -> DecoderKernel | None:
        """Return layers that follow each other as one kernel; None where a part is not as it has to be.

        `head` is what follows the last of them, if it has kernels; the kernel says by `has_head` whether it can run it.
        """
        ...
