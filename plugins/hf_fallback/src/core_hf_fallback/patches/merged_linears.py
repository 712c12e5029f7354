"""merged-linears: linears that are given the very same tensor become one matrix product.

    q_proj(x), k_proj(x), v_proj(x)   ->   the first one called multiplies by all three weights, each takes its columns

Which linears share an input, the recording forward has seen. While serving nothing is taken for granted: a part that is
given another tensor, or the same one a second time, has the product computed anew.

Large weights stay apart on a CPU: merging copies them, and what it saves is a call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from core.kernel_contracts import Kernels
from core.layers import QuantizedTensor
from core.memory import trim
from core_hf_fallback.patches.calls import LinearCalls

BETWEEN_TRIMS = 16 << 20  # bytes of merged weights; their parts' memory is given back then
MOST_ON_CPU = 16 << 20  # bytes of a product's weights: reading more takes so long that one call less is no gain


class Last:
    """The parts of the last product that were not taken yet. No module: setting a module's attributes is slow."""

    __slots__ = ("input", "left", "outputs")

    def __init__(self) -> None:
        self.input: Tensor | None = None  # kept alive, so that no other tensor can be taken for it
        self.outputs: list[Tensor | None] = []
        self.left = 0

    def take(self, index: int, x: Tensor) -> Tensor | None:
        """Return part `index` of the product with x, once; None if it has to be computed."""
        if x is not self.input:
            return None
        out, self.outputs[index] = self.outputs[index], None
        self.left -= out is not None
        if not self.left:
            self.input = None
        return out

    def put(self, index: int, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """Keep a product, all but the part that is asked for now; return that."""
        self.input, self.outputs, self.left = x, list(outputs), len(outputs) - 1
        self.outputs[index] = None
        return outputs[index]


class Merged(nn.Module):
    """The product of several linears over one input; `linear` is packed like any other."""

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [part.out_features for part in parts]
        first = parts[0]
        self.linear = nn.Linear(first.in_features, sum(self.sizes), bias=first.bias is not None, device="meta")
        self.linear.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]), requires_grad=False)
        if first.bias is not None:
            self.linear.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]), requires_grad=False)
        self.last = Last()

    def rows(self, index: int) -> slice:
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])


class Part(nn.Module):
    """Stands where one of the linears stood."""

    def __init__(self, merged: Merged, index: int, in_features: int) -> None:
        super().__init__()
        if index == 0:
            self.merged = merged  # in the tree once, where it is found and packed
        self.__dict__["merged"] = merged
        self.last = merged.last
        self.index, self.in_features, self.out_features = index, in_features, merged.sizes[index]

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.merged.linear.weight[self.merged.rows(self.index)]
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias = self.merged.linear.bias
        return None if bias is None else bias[self.merged.rows(self.index)]

    def __call__(self, x: Tensor) -> Tensor:
        """Without nn.Module's detour, unless there is a hook to call."""
        if self._forward_hooks or self._forward_pre_hooks:
            out: Tensor = super().__call__(x)
            return out
        return self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], a view of the product."""
        found = self.last.take(self.index, x)
        if found is not None:
            return found
        product = self.merged.linear.forward(x)
        return self.last.put(self.index, x, torch.split_with_sizes(product, self.merged.sizes, -1))


def merge_linears(module: nn.Module, calls: LinearCalls, _: Kernels | None) -> list[Callable[[], None]]:
    """Merge every group that can be; return how to undo each."""
    shared = _shared(module)
    undo = []
    merged = 0
    for paths in calls.siblings():
        parts = [module.get_submodule(path) for path in paths]
        plain = [part for part in parts if type(part) is nn.Linear and _can_merge(part, shared)]
        if len(plain) == len(parts) and _join(plain) and _gains(plain):
            undo.append(_merge(module, paths, plain))
            merged += _size(module.get_submodule(paths[0]).merged.linear)
            if merged > BETWEEN_TRIMS:
                merged = 0
                trim()
    return undo


def _merge(module: nn.Module, paths: Sequence[str], parts: Sequence[nn.Linear]) -> Callable[[], None]:
    merged = Merged(parts)
    parent = module.get_submodule(paths[0].rpartition(".")[0])
    names = [path.rpartition(".")[2] for path in paths]
    for index, (name, part) in enumerate(zip(names, parts, strict=True)):
        setattr(parent, name, Part(merged, index, part.in_features))
        part.register_parameter("weight", None)  # its memory is the merged one's now
        part.register_parameter("bias", None)

    def undo() -> None:
        linear = merged.linear
        for index, (name, part) in enumerate(zip(names, parts, strict=True)):
            rows = merged.rows(index)
            part.weight = nn.Parameter(linear.weight.detach()[rows].clone(), requires_grad=False)
            if linear.bias is not None:
                part.bias = nn.Parameter(linear.bias.detach()[rows].clone(), requires_grad=False)
            setattr(parent, name, part)

    return undo


def _shared(module: nn.Module) -> set[int]:
    """Ids of modules and parameters that are found in several places."""
    places: Counter[int] = Counter()
    for _, part in module.named_modules(remove_duplicate=False):
        places[id(part)] += 1
    for _, weight in module.named_parameters(remove_duplicate=False):
        places[id(weight)] += 1
    return {one for one, count in places.items() if count > 1}


def _can_merge(part: nn.Linear, shared: set[int]) -> bool:
    """False where somebody else looks at the linear (tied, hooked, patched) or its weight is more than a plain one."""
    if part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
        return False
    held = (part, *part._parameters.values())
    if any(id(one) in shared for one in held):
        return False
    return type(part.weight) is nn.Parameter or isinstance(part.weight, QuantizedTensor)


def _join(parts: Sequence[nn.Linear]) -> bool:
    """True if the weights can stand in one; quantized ones have to share their layout too."""
    first = parts[0].weight
    if isinstance(first, QuantizedTensor) and not all(first.joins(part.weight) for part in parts[1:]):
        return False
    return len({(*_kind(part), type(part.weight)) for part in parts}) == 1


def _gains(parts: Sequence[nn.Linear]) -> bool:
    """False on a CPU for large weights, which would be copied, mapped files into memory too."""
    return parts[0].weight.device.type != "cpu" or sum(map(_size, parts)) <= MOST_ON_CPU


def _size(part: nn.Linear) -> int:
    """Bytes of a linear's weight."""
    held = part.weight.parts.values() if isinstance(part.weight, QuantizedTensor) else (part.weight,)
    return sum(one.nbytes for one in held)


def _kind(part: nn.Linear) -> tuple[object, ...]:
    return part.in_features, part.weight.dtype, part.weight.device, part.bias is None
