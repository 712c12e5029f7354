"""The functions beside the matrices: RMSNorm, gated activations, rotary embedding. All in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from core_cpu_kernels.library import Library

ACTIVATIONS = {"silu": 1, "gelu_tanh": 2}


class NormKernel:
    """A `core.kernel_contracts.NormKernel`."""

    def __init__(self, library: Library, weight: Tensor, eps: float) -> None:
        self.library, self.eps, self.at, self.width = library, eps, weight.data_ptr(), len(weight)
        self._run, self._weight = library.rms_norm, weight

    def __call__(self, x: Tensor) -> Tensor:
        return self._into(x, None, None)

    def of_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        return self(x.index_select(0, rows))

    def add(self, x: Tensor, residual: Tensor, summed: Tensor) -> Tensor:
        return self._into(x, residual.data_ptr(), summed.data_ptr())

    def _into(self, x: Tensor, residual: int | None, summed: int | None) -> Tensor:
        width = self.width
        if not x.is_contiguous():
            x = x.contiguous()
        out = torch.empty_like(x)
        rows = x.numel() // width
        self._run(x.data_ptr(), residual, summed, self.at, out.data_ptr(), rows, width, self.eps)
        return out


class GateKernel:
    """A `core.kernel_contracts.GateKernel`."""

    def __init__(self, library: Library, kind: int) -> None:
        self._run, self.kind = library.gate, kind

    def __call__(self, gate_up: Tensor) -> Tensor:
        if not gate_up.is_contiguous():
            gate_up = gate_up.contiguous()
        *leading, both = gate_up.shape
        width = both // 2
        out = gate_up.new_empty((*leading, width))
        at = gate_up.data_ptr()
        self._run(at, at + 4 * width, out.data_ptr(), out.numel() // width, width, both, both, self.kind)
        return out


class RotaryKernel:
    """A `core.kernel_contracts.RotaryKernel`."""

    def __init__(self, library: Library) -> None:
        self._run = library.rotate

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        tokens, heads, width = *x.shape[:2], cos.shape[2]
        token_stride, head_stride, _ = x.stride()
        self._run(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), tokens, heads, width, token_stride, head_stride, cos.stride(0)
        )
