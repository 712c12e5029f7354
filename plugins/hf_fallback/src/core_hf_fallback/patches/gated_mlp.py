"""gated-mlp: down(activation(gate(x)) * up(x)) in three calls (Shazeer 2020).

A block is known by its children, two or three linears and at most an activation, and by what it made of its input in
the recording forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from core.kernel_contracts import GateKernel, Kernels
from core_hf_fallback.patches.calls import BlockCall, LinearCalls
from core_hf_fallback.patches.operations import ACTIVATIONS, gated
from core_hf_fallback.patches.shapes import is_hooked, linears_of, others_of, replace_forwards, same, together

Forward = Callable[[Tensor], Tensor]


def fuse_gates(module: nn.Module, calls: LinearCalls, kernels: Kernels | None) -> list[Callable[[], None]]:
    """Replace the forward of every such block; return how to undo each."""
    return replace_forwards(
        module, calls, lambda block, path, call: recognise(block, path, call, calls.choices, kernels)
    )


@torch.inference_mode()
def recognise(
    block: nn.Module, path: str, call: BlockCall, choices: dict[str, str], kernels: Kernels | None
) -> Forward | None:
    """Return the quicker form of a block that made of its input what the formula makes of it; else None.

    `choices` gets the activation by the block's path; in a block that is like another it says which one.
    """
    if len(call.args) != 1 or call.kwargs or is_hooked(block):
        return None
    x = call.args[0]
    if not isinstance(x, Tensor) or block._parameters:
        return None
    if len(others_of(block)) > 1 or any(len(list(other.parameters())) for other in others_of(block)):
        return None
    candidates = list(_candidates(block, kernels, x.dtype))
    if call.of_another:
        return next((made for activation, made in candidates if choices.get(path) == activation), None)
    found = [(activation, made, made(x)) for activation, made in candidates]
    fitting = [one for one in found if same(one[2], call.output)]
    if not fitting:
        return None
    # In half types more than one kind of GELU may fit.
    choices[path], best, _ = min(fitting, key=lambda one: float((one[2] - call.output).abs().sum()))
    return best


def _candidates(block: nn.Module, kernels: Kernels | None, dtype: torch.dtype) -> Iterator[tuple[str, Forward]]:
    parts = [part for _, part in linears_of(block)]
    if len(parts) not in (2, 3):
        return
    *first, down = parts
    widths = {int(part.out_features) for part in first}  # type: ignore[arg-type]
    if widths != {int(down.in_features) * (3 - len(first))}:  # type: ignore[arg-type]
        return
    product = first[0] if len(first) == 1 else together(first)
    for activation in ACTIVATIONS:
        gate = gated(activation, kernels, dtype)
        if gate is not None:
            whole = [product] if product is not None else first
            kernel = None if kernels is None else kernels.gate(activation, dtype)
            yield activation, FusedMLP(whole, down, activation, gate, kernel, block.forward, dtype)


class FusedMLP:
    """The quicker form: a product for gate and up, or one for each."""

    def __init__(
        self,
        first: list[nn.Module],
        down: nn.Module,
        activation: str,
        gate: Forward,
        kernel: GateKernel | None,
        plain: Forward,
        dtype: torch.dtype,
    ) -> None:
        self.first, self.down, self.plain, self.dtype = first, down, plain, dtype
        self.gate_kernel = kernel
        self._multiply, self._down = [part.forward for part in first], down.forward
        self._gate, self._activation = gate, ACTIVATIONS[activation]

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is not self.dtype:
            return self.plain(x)
        if len(self._multiply) == 1:
            inner = self._gate(self._multiply[0](x))
        else:
            inner = self._activation(self._multiply[0](x)) * self._multiply[1](x)
        out: Tensor = self._down(inner)
        return out
