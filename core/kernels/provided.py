"""The kernels beside attention that a GPU offers to layers and to the fallback: a `core.kernel_contracts.Kernels`.

Products with quantized weights and with experts, RMSNorm, gated activations and rotary embedding. One plain weight has
none: torch's own product is the chip maker's. Results are rounded where torch's operators one after the other round
them, so that a model gives the same numbers with kernels and without, but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.errors import KernelError
from core.kernel_contracts import HeadParts, LayerParts, LinearKernel
from core.kernels.checks import FLOATS
from core.kernels.chip import INTERPRETED
from core.kernels.dequant_matmul import Codes, dequant_matmul, unfit
from core.kernels.gated_activation import ACTIVATIONS, gated_activation
from core.kernels.grouped_matmul import grouped_matmul
from core.kernels.rms_norm import rms_norm
from core.kernels.rotary import rotary
from core.layers.quant_formats import AffineTensor, Float8Tensor, TableTensor

NIBBLES_MIDDLE, BYTES_MIDDLE = 8, 128  # the zero of codes that state none


class TritonKernels:
    """A `core.kernel_contracts.Kernels` for CUDA and ROCm; for a CPU in Triton's interpreter."""

    name = "triton (interpreted)" if INTERPRETED else "triton"
    takes_float32 = False

    def linear(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        if weight.dim() != 2 or 0 in weight.shape or not _is_here(weight):
            return None
        codes = codes_of(weight)
        if codes is None or unfit(codes) is not None:
            return None
        order = getattr(weight, "settings", {}).get("order")
        return Product(
            codes, None if bias is None else bias.detach(), None if order is None else order.to(weight.device)
        )

    def highest(self, linear: LinearKernel) -> None:
        """There is none: plain weights have no kernel here."""

    def experts(self, weights: Tensor, bias: Tensor | None) -> Experts | None:
        plain = type(weights) in (Tensor, torch.nn.Parameter) and weights.dtype in FLOATS and _is_here(weights)
        dense = 1 in weights.stride()[1:] and (bias is None or bias.is_contiguous())
        return Experts(weights, bias) if plain and dense else None

    def rms_norm(self, weight: Tensor, eps: float, dtype: torch.dtype) -> Norm | None:
        plain = _is_here(weight) and weight.is_contiguous() and weight.dtype in (torch.float32, dtype)
        return Norm(weight, eps) if plain and dtype in FLOATS else None

    def gate(self, activation: str, dtype: torch.dtype) -> Gate | None:
        return Gate(activation) if activation in ACTIVATIONS and dtype in FLOATS else None

    def rotary(self, dtype: torch.dtype, interleaved: bool = False) -> Turn | None:
        return Turn(interleaved) if dtype in FLOATS else None

    def decoder(self, layers: Sequence[LayerParts], head: HeadParts | None = None) -> None:
        """None: steps on a GPU are captured whole instead."""


def _is_here(tensor: Tensor) -> bool:
    """True on a device that has kernels."""
    return tensor.device.type == "cuda" or (tensor.device.type == "cpu" and INTERPRETED)


def codes_of(weight: Tensor) -> Codes | None:
    """Return what the kernel reads of a quantized weight [out, in]; None for what it cannot read."""
    if isinstance(weight, AffineTensor):
        bits, middle = weight.settings["bits"], None
        if not weight.parts.keys() & {"zeros", "offsets"}:
            middle = NIBBLES_MIDDLE if bits == 4 else BYTES_MIDDLE
        extras = {"zeros": weight.parts.get("zeros"), "offsets": weight.parts.get("offsets"), "middle": middle}
        return _codes(weight, bits, weight.settings["group_size"], **extras)
    if isinstance(weight, TableTensor):
        table = torch.tensor(weight.settings["table"], dtype=torch.float32, device=weight.device)
        return _codes(weight, 4, weight.settings["group_size"], table=table)
    if isinstance(weight, Float8Tensor):
        # As a table: before sm_89 there is no instruction that reads float8.
        every = torch.arange(256, dtype=torch.uint8, device=weight.device)
        table = every.view(getattr(torch, weight.settings["format"])).float()
        return _codes(weight, 8, weight.settings["block"], table=table)
    return None


def _codes(weight: Any, bits: int, group: int, **extras: Any) -> Codes:
    return Codes(weight.parts["codes"], weight.parts["scales"], bits, group, weight.in_features, **extras)


@dataclass(frozen=True)
class Product:
    """x [..., in] -> x @ weight.T + bias [..., out], in x's dtype."""

    codes: Codes
    bias: Tensor | None
    order: Tensor | None  # int64 [in]: code column j is the weight's column order[j]

    def __call__(self, x: Tensor) -> Tensor:
        """Raises KernelError for an x of another width, device or kind of number."""
        if x.shape[-1] != self.codes.columns:
            raise KernelError(f"This linear takes [..., {self.codes.columns}], not {list(x.shape)}.")
        rows = x.reshape(-1, x.shape[-1])
        rows = rows.contiguous() if self.order is None else rows.index_select(1, self.order)
        out = rows.new_empty(len(rows), self.codes.outputs)
        dequant_matmul(rows, self.codes, out, self.bias)
        return out.view(*x.shape[:-1], self.codes.outputs)

    def __deepcopy__(self, memo: Any) -> Product:
        return self  # the weight that it reads is never written to


@dataclass(frozen=True)
class Experts:
    """A `core.kernel_contracts.ExpertsKernel`."""

    weights: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, starts: Tensor, source: Tensor | None) -> Tensor:
        out = x.new_empty(len(x) if source is None else len(source), self.weights.shape[1])
        grouped_matmul(x, self.weights, starts, out, source, self.bias)
        return out


@dataclass(frozen=True)
class Norm:
    """A `core.kernel_contracts.NormKernel`."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        rows = x if x.dim() in (2, 3) else x.reshape(-1, x.shape[-1])
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rms_norm(rows if rows.stride(-1) == 1 else rows.contiguous(), self.weight, self.eps, out.view(rows.shape))
        return out

    def of_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        out = x.new_empty(len(rows), x.shape[1])
        rms_norm(x, self.weight, self.eps, out, rows=rows)
        return out

    def add(self, x: Tensor, residual: Tensor, summed: Tensor) -> Tensor:
        out, size = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[-1]
        if summed is not residual:
            summed.copy_(residual)
        rms_norm(x.view(-1, size), self.weight, self.eps, out.view(-1, size), summed.view(-1, size))
        return out


@dataclass(frozen=True)
class Gate:
    """A `core.kernel_contracts.GateKernel`."""

    activation: str

    def __call__(self, gate_up: Tensor) -> Tensor:
        rows = gate_up.reshape(-1, gate_up.shape[-1])
        out = rows.new_empty(len(rows), rows.shape[1] // 2)
        gated_activation(rows, out, self.activation)
        return out.view(*gate_up.shape[:-1], out.shape[1])


@dataclass(frozen=True)
class Turn:
    """A `core.kernel_contracts.RotaryKernel`."""

    interleaved: bool

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        half = cos.shape[-1] // 2
        rotary(x, cos[:, 0, :half], sin[:, 0, :half], x, self.interleaved)
