"""The operations that patched blocks are made of: a device's kernels, torch where there are none. Float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from core.contracts import Kernels, NormKernel
from core.layers import apply_rotary

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


class Norm:
    """RMSNorm with a scale [size]; `plain` is the module's own forward, for other dtypes."""

    def __init__(self, scale: Tensor, eps: float, plain: Callable[[Tensor], Tensor], kernels: Kernels | None) -> None:
        self.scale, self.plain, self.size = scale.contiguous(), plain, len(scale)
        self.eps = eps
        self.floor = torch.full((1,), eps, device=scale.device)
        self.kernel: NormKernel | None = None if kernels is None else kernels.rms_norm(self.scale, eps, torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32:
            return self.plain(x)
        if self.kernel is not None:
            return self.kernel(x)
        if x.is_cuda:
            return F.rms_norm(x, (self.size,), self.scale, self.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(self.floor, length, length, value=1 / self.size).rsqrt_()).mul_(self.scale)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of residual + x, and that sum."""
        if self.kernel is None or x.dtype is not torch.float32 or not residual.is_contiguous():
            summed = residual + x
            return self(summed), summed
        summed = torch.empty_like(residual)
        return self.kernel.add(x, residual, summed), summed


def gated(activation: str, kernels: Kernels | None) -> Callable[[Tensor], Tensor]:
    """Return x [..., 2 n] -> activation(x[..., :n]) * x[..., n:]."""
    kernel = None if kernels is None else kernels.gate(activation, torch.float32)
    if kernel is not None:
        return kernel
    function = ACTIVATIONS[activation]

    def gate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return function(first) * second

    return gate


def rotation(kernels: Kernels | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the function that turns x [tokens, heads, dim] in halves by cos and sin [tokens, 1, dim]; x may change."""
    kernel = None if kernels is None else kernels.rotary(torch.float32)
    if kernel is None:
        return apply_rotary

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        kernel(x, cos, sin)
        return x

    return rotate
