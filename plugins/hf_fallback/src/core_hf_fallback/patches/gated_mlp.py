"""gated-mlp: down(activation(gate(x)) * up(x)) in three calls (Shazeer 2020).

A block is known by its children, two or three linears and at most an activation, and by what it made of its input in
the recording forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from core.contracts import Kernels
from core_hf_fallback.patches.calls import BlockCall, LinearCalls
from core_hf_fallback.patches.operations import ACTIVATIONS, gated
from core_hf_fallback.patches.shapes import is_hooked, linears_of, others_of, replace_forwards, same, together

Forward = Callable[[Tensor], Tensor]


def fuse_gates(module: nn.Module, calls: LinearCalls, kernels: Kernels | None) -> list[Callable[[], None]]:
    """Replace the forward of every such block; return how to undo each."""
    return replace_forwards(module, calls, lambda block, _, call: recognise(block, call, kernels))


@torch.inference_mode()
def recognise(block: nn.Module, call: BlockCall, kernels: Kernels | None) -> Forward | None:
    """Return the quicker form of a block that made of its input what the formula makes of it; else None."""
    if len(call.args) != 1 or call.kwargs or is_hooked(block):
        return None
    x = call.args[0]
    if not isinstance(x, Tensor) or block._parameters:
        return None
    if len(others_of(block)) > 1 or any(len(list(other.parameters())) for other in others_of(block)):
        return None
    found = [(made, made(x)) for made in _candidates(block, kernels, x.dtype)]
    fitting = [(made, out) for made, out in found if same(out, call.output)]
    # In half types more than one kind of GELU may fit.
    return min(fitting, key=lambda pair: float((pair[1] - call.output).abs().sum()), default=(None, None))[0]


def _candidates(block: nn.Module, kernels: Kernels | None, dtype: torch.dtype) -> Iterator[Forward]:
    parts = [part for _, part in linears_of(block)]
    if len(parts) not in (2, 3):
        return
    *first, down = parts
    widths = {int(part.out_features) for part in first}  # type: ignore[arg-type]
    if widths != {int(down.in_features) * (3 - len(first))}:  # type: ignore[arg-type]
        return
    product = first[0].forward if len(first) == 1 else together(first)
    for activation, function in ACTIVATIONS.items():
        gate = gated(activation, kernels, dtype)
        if gate is None:
            continue
        if product is None:
            inner = _two_products(first[0].forward, first[1].forward, function)
        else:
            inner = _one_product(product, gate)
        yield _gated_mlp(inner, down.forward, block.forward, dtype)


def _one_product(product: Forward, gate: Forward) -> Forward:
    return lambda x: gate(product(x))


def _two_products(gate: Forward, up: Forward, activation: Forward) -> Forward:
    return lambda x: activation(gate(x)) * up(x)


def _gated_mlp(inner: Forward, down: Forward, plain: Forward, dtype: torch.dtype) -> Forward:
    def forward(x: Tensor) -> Tensor:
        return down(inner(x)) if x.dtype is dtype else plain(x)

    return forward
