"""rms-norm: y = x / sqrt(mean(x^2) + eps) * w or * (1 + w) over the last dimension (Zhang and Sennrich 2019).

transformers writes it in eight operations with two conversions of dtype; in float32 four give the same numbers, and a
device's kernel takes half types too. A module is known by trying it: one vector of weights, one argument, and the
formula's values on random input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from core.kernel_contracts import Kernels
from core_hf_fallback.patches.calls import LinearCalls
from core_hf_fallback.patches.operations import Norm

SCALES = (1.0, 30.0, 1e-3)  # of the input that is tried; the smallest is where eps counts
LARGEST_EPS = 0.1
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def fuse_norms(module: nn.Module, _: LinearCalls, kernels: Kernels | None) -> list[Callable[[], None]]:
    """Replace the forward of every such norm by a `Norm`; return how to undo each."""
    undo = []
    for part in module.modules():
        made = recognise(part, kernels)
        if made is not None:
            part.forward = made  # type: ignore[method-assign]
            undo.append(lambda part=part: delattr(part, "forward"))
    return undo


def recognise(part: nn.Module, kernels: Kernels | None = None) -> Norm | None:
    """Return the quicker form of a module that computes RMSNorm, None for any other module."""
    weight = _only_weight(part)
    if weight is None or type(part).__module__.startswith("torch.") or not _takes_one_argument(part):
        return None
    for eps in sorted({value for value in vars(part).values() if isinstance(value, float) and 0 < value < LARGEST_EPS}):
        for scale in _scales(weight.detach()):
            made = Norm(scale, eps, part.forward, kernels, weight.dtype)
            if made.can and _same(part.forward, made):
                return made
    return None


def _scales(weight: Tensor) -> list[Tensor]:
    """What the quotient may be multiplied with; in half types it is rounded before or after."""
    if weight.dtype == torch.float32:
        return [weight, 1 + weight]
    return [weight, weight.float(), 1 + weight.float()]


def _only_weight(part: nn.Module) -> Tensor | None:
    weights = list(part._parameters.values())
    bare = not part._modules and not part._buffers and not part._forward_hooks and "forward" not in part.__dict__
    if not bare or len(weights) != 1 or type(weights[0]) is not nn.Parameter:
        return None
    weight = weights[0]
    return weight if weight.dim() == 1 and weight.dtype in FLOATS and weight.device.type != "meta" else None


def _takes_one_argument(part: nn.Module) -> bool:
    parameters = list(inspect.signature(part.forward).parameters.values())
    return len(parameters) == 1 and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


@torch.inference_mode()
def _same(plain: Callable[[Tensor], Tensor], made: Norm) -> bool:
    generator = torch.Generator().manual_seed(0)
    for spread in SCALES:
        x = (torch.randn(2, 3, made.size, generator=generator) * spread).to(made.scale.device, made.dtype)
        try:
            wanted = plain(x.clone())
        except Exception:  # noqa: BLE001 - anybody's module, called with a guess: it may fail in any way
            return False
        if not isinstance(wanted, Tensor) or wanted.dtype != x.dtype or wanted.shape != x.shape:
            return False
        if not _alike(made(x), wanted):
            return False
    return True


def _alike(found: Tensor, wanted: Tensor) -> bool:
    """Half types tell by what is rounded when: nearly all numbers have to be the very same."""
    if found.dtype == torch.float32:
        return torch.allclose(found, wanted, rtol=5e-6, atol=1e-7)
    return bool((found == wanted).double().mean() > 0.98) and torch.allclose(found, wanted, rtol=2**-6)
