"""grouped-experts: the experts of a mixture in two products over rows sorted by expert (Gale et al. 2022, MegaBlocks).

A block is known by what transformers' experts interface says of it, and by what it made of its input in the recording
forward. Only for a device with a kernel for it, which waits for nobody to learn how tokens were routed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from core.kernel_contracts import ExpertsKernel, Kernels
from core_hf_fallback.patches.calls import BlockCall, LinearCalls
from core_hf_fallback.patches.shapes import is_hooked, replace_forwards, same

SAID = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel", "num_experts")
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def group_experts(module: nn.Module, calls: LinearCalls, kernels: Kernels | None) -> list[Callable[[], None]]:
    """Replace the forward of every such block; return how to undo each."""
    return replace_forwards(module, calls, lambda block, _, call: recognise(block, call, kernels))


@torch.inference_mode()
def recognise(block: Any, call: BlockCall, kernels: Kernels | None) -> Forward | None:
    """Return the quicker form of a block of experts that made of its input what the products make of it; else None."""
    if kernels is None or not all(hasattr(block, name) for name in SAID) or is_hooked(block):
        return None
    if block._is_expert_parallel or block.has_post_expert_norm or len(call.args) != 3 or call.kwargs:
        return None
    first, down = (
        _product(block, name, kernels) for name in ("gate_up_proj" if block.has_gate else "up_proj", "down_proj")
    )
    if first is None or down is None:
        return None
    made = _grouped(block, first, down)
    if call.args[0].dim() != 2 or not (call.of_another or same(made(*call.args), call.output)):
        return None
    return made


def _product(block: Any, name: str, kernels: Kernels) -> ExpertsKernel | None:
    weights, bias = getattr(block, name), getattr(block, f"{name}_bias") if block.has_bias else None
    if type(weights) is not nn.Parameter or weights.dim() != 3:
        return None
    upright = weights.detach().transpose(1, 2) if block.is_transposed else weights.detach()
    return kernels.experts(upright, None if bias is None else bias.detach())


def _grouped(block: Any, first: ExpertsKernel, down: ExpertsKernel) -> Forward:
    activate = block._apply_gate if block.has_gate else block.act_fn
    plain, count = block.forward, block.num_experts

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if hidden_states.dim() != 2:
            answer: Tensor = plain(hidden_states, top_k_index, top_k_weights)
            return answer
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        starts = torch.searchsorted(experts, torch.arange(count + 1, device=experts.device), out_int32=True)
        source = (order // top_k_index.shape[1]).int()
        out = down(activate(first(hidden_states, starts, source)), starts, None)
        weighted = out * top_k_weights.reshape(-1)[order, None]
        back = torch.empty_like(weighted).index_copy_(0, order, weighted)
        return back.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    return forward
