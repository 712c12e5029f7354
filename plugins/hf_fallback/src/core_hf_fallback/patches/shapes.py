"""What a patched block is made of: its linears, one by one or merged, and how near two results are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.layers.linear import KernelLinear, PackedLinear, SharedLinear
from core.layers.quantized import QuantizedLinear
from core_hf_fallback.patches.calls import BlockCall, LinearCalls
from core_hf_fallback.patches.merged_linears import Part

HALF_ERROR = {torch.bfloat16: 2**-7, torch.float16: 2**-10}  # two roundings, by norm: products are added up otherwise
LINEARS = (nn.Linear, PackedLinear, KernelLinear, QuantizedLinear, SharedLinear, Part)


def replace_forwards(
    module: nn.Module, calls: LinearCalls, recognise: Callable[[nn.Module, str, BlockCall], Callable[..., Any] | None]
) -> list[Callable[[], None]]:
    """Replace the forward of every block that was called once and is recognised; return how to undo each."""
    undo = []
    for path, found in calls.blocks.items():
        block = module.get_submodule(path)
        made = None if len(found) != 1 or "forward" in vars(block) else recognise(block, path, found[0])
        if made is not None:
            block.forward = made
            undo.append(lambda block=block: delattr(block, "forward"))
    return undo


def linears_of(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the children that are linears, as they were declared, if they stand in no other place of the block."""
    return [(name, child) for name, child in block.named_children() if type(child) in LINEARS]


def others_of(block: nn.Module) -> list[nn.Module]:
    return [child for child in block.children() if type(child) not in LINEARS]


def together(parts: Sequence[nn.Module]) -> nn.Module | None:
    """Return the linear x [..., in] -> [..., sum of out] that just these parts were merged into; else None."""
    first = parts[0]
    if not all(type(part) is Part for part in parts):
        return None
    assert isinstance(first, Part)
    merged = first.__dict__["merged"]
    whole = [part.index for part in parts if isinstance(part, Part) and part.__dict__["merged"] is merged]
    if whole != list(range(len(merged.sizes))):
        return None
    linear: nn.Module = merged.linear
    return linear


def is_hooked(block: nn.Module) -> bool:
    """True if somebody looks at or has changed any part of a block."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in block.modules())


def same(found: Tensor, wanted: object) -> bool:
    """True if two results differ by no more than the order of additions, and activations of 16 bits, explain."""
    if not isinstance(wanted, Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if found.dtype in HALF_ERROR:
        error = torch.linalg.vector_norm(found.float() - wanted.float())
        return bool(error <= HALF_ERROR[found.dtype] * torch.linalg.vector_norm(wanted.float()))
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    return torch.allclose(found, wanted, rtol=1e-4, atol=2e-4 * max(scale, 1e-6))
