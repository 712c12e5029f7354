"""The operations that patched blocks are made of: a device's kernels; in float32 torch, where there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.kernel_contracts import Kernels, NormKernel, RotaryKernel
from core.layers import apply_rotary

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


class Norm:
    """RMSNorm with a scale [size] for x of one dtype; `plain` is the module's own forward, for others.

    Half types need the kernel: `can` is False without. A float32 scale then says that x is rounded once, at the end.
    """

    def __init__(
        self,
        scale: Tensor,
        eps: float,
        plain: Callable[[Tensor], Tensor],
        kernels: Kernels | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.scale, self.plain, self.size = scale.contiguous(), plain, len(scale)
        self.eps, self.dtype = eps, dtype
        self.floor = torch.full((1,), eps, device=scale.device)
        self.kernel: NormKernel | None = None if kernels is None else kernels.rms_norm(self.scale, eps, dtype)

    @property
    def can(self) -> bool:
        return self.kernel is not None or self.dtype is torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is not self.dtype:
            return self.plain(x)
        if self.kernel is not None:
            return self.kernel(x)
        if x.is_cuda:
            return F.rms_norm(x, (self.size,), self.scale, self.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(self.floor, length, length, value=1 / self.size).rsqrt_()).mul_(self.scale)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of residual + x, and that sum."""
        if self.kernel is None or x.dtype is not self.dtype or not residual.is_contiguous():
            summed = residual + x
            return self(summed), summed
        summed = torch.empty_like(residual)
        return self.kernel.add(x, residual, summed), summed


def gated(activation: str, kernels: Kernels | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """Return x [..., 2 n] -> activation(x[..., :n]) * x[..., n:]; None for half types without a kernel."""
    kernel = None if kernels is None else kernels.gate(activation, dtype)
    if kernel is not None or dtype is not torch.float32:
        return kernel
    function = ACTIVATIONS[activation]

    def gate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return function(first) * second

    return gate


@dataclass(frozen=True)
class Rotation:
    """Turns the first dimensions of x [tokens, heads, dim] by cos and sin [tokens, 1, rotated]; x may change."""

    interleaved: bool
    repeated: bool  # the angle of pair i stands at 2 i and 2 i + 1, instead of at i and i + rotated / 2
    kernel: RotaryKernel | None

    @property
    def form(self) -> str:
        return f"{'pairs' if self.interleaved else 'halves'}{', angles twice' if self.repeated else ''}"

    def angles(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., ::2]] * 2, -1) if self.repeated else x

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`cos` and `sin` are what `angles` gave."""
        if self.kernel is not None:
            self.kernel(x, cos, sin)
            return x
        rotated = cos.shape[-1]
        turned = self._turned(x[..., :rotated], cos, sin)
        return turned if rotated == x.shape[-1] else torch.cat([turned, x[..., rotated:]], -1)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not self.interleaved:
            return apply_rotary(x, cos, sin)
        halves = torch.cat([x[..., ::2], x[..., 1::2]], -1)
        return torch.stack(apply_rotary(halves, cos, sin).chunk(2, -1), -1).flatten(-2)


FORMS = ((False, False), (True, False), (True, True))  # interleaved, repeated


def rotations(kernels: Kernels | None, dtype: torch.dtype) -> Iterator[Rotation]:
    """Yield the ways in which models rotate that can be computed here; half types need a kernel."""
    for interleaved, repeated in FORMS:
        kernel = None if kernels is None else kernels.rotary(dtype, interleaved)
        if kernel is not None or dtype is torch.float32:
            yield Rotation(interleaved, repeated, kernel)
