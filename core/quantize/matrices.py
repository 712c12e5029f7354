"""The matrices of a decoder layer that can be quantized, each as a linear: real ones, Conv1Ds, experts out of a stack.

A view shares its memory with the module that computes with it, so that whoever changes the one changes the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from core.quant_weights import is_conv1d, stacks_of_experts

FEWEST_ROWS = 16  # a matrix of fewer stays in floats, and so does one of few for its inputs: routers, small gates and
NARROW = 32  # the like cost little and matter much


class ViewedLinear(nn.Linear):
    """A linear [out, in] over memory of another module, which does the computing."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", bias)


@dataclass
class Matrices:
    """What one layer has. Names of matrices are those of modules within the layer, or stand for an expert's."""

    linears: dict[str, nn.Linear] = field(default_factory=dict)  # those that are worth quantizing
    left: list[str] = field(default_factory=list)  # those that stay in floats
    others: list[str] = field(default_factory=list)  # parameters that a file keeps whole and a module multiplies itself
    in_file: dict[str, str] = field(default_factory=dict)  # expert's matrix -> its module's whole name in a file

    def leave(self, unfit: Callable[[nn.Linear], bool]) -> int:
        """Leave linears in floats; return how many."""
        names = [name for name, linear in self.linears.items() if unfit(linear)]
        for name in names:
            del self.linears[name]
        self.left += names
        return len(names)


def find_matrices(model: nn.Module, name: str, layer: nn.Module) -> Matrices:
    """Return the matrices of the layer called `name` in the model."""
    found = Matrices()
    known: set[int] = set()  # ids of their parameters
    for path, module in layer.named_modules():
        if isinstance(module, nn.Linear) or is_conv1d(module):
            _sort_in(found, path, module if isinstance(module, nn.Linear) else _of_conv1d(module))
            known.add(id(module.weight))
        for stack in stacks_of_experts(module):
            weight = getattr(module, stack)
            if _add_experts(found, model, name, f"{path}.{stack}", weight):
                known.add(id(weight))
    found.others = [path for path, weight in layer.named_parameters() if id(weight) not in known and _is_large(weight)]
    return found


def _is_large(weight: Tensor) -> bool:
    return weight.dim() > 1 and min(weight.shape[-2:]) >= FEWEST_ROWS


def _sort_in(found: Matrices, path: str, linear: nn.Linear) -> None:
    enough = linear.out_features >= FEWEST_ROWS and linear.out_features * NARROW > linear.in_features
    if enough:
        found.linears[path] = linear
    else:
        found.left.append(path)


def _of_conv1d(module: Any) -> ViewedLinear:
    return ViewedLinear(module.weight.data.T, module.bias)


# ------------------------------------------------------------------------------------------------ experts


def _add_experts(found: Matrices, model: nn.Module, layer: str, path: str, stack: Tensor) -> bool:
    """Files name every expert's matrices. False where transformers' own saving does not cut a stack so."""
    places = _places(model, f"{layer}.{path}", stack)
    if places is None:
        return False
    owner = path.rpartition(".")[0]
    for stored, (expert, rows) in places.items():
        inner = f"{owner}.{expert}.{stored.rpartition('.')[2]}"
        found.in_file[inner] = stored
        _sort_in(found, inner, ViewedLinear(stack.data[expert, rows]))
    return True


def _places(model: nn.Module, name: str, stack: Tensor) -> dict[str, tuple[int, slice]] | None:
    """Return module in the file -> which expert's rows it is; None unless the whole stack is cut into such."""
    from transformers.core_model_loading import revert_weight_conversion

    experts, out, _ = stack.shape
    numbers = torch.arange(experts * out).view(experts, out, 1)  # each row's own, so that it is known again
    try:
        cut: Mapping[str, Tensor] = revert_weight_conversion(model, {name: numbers})
    except (RuntimeError, ValueError, IndexError, KeyError):  # a conversion that needs whole weights
        return None
    found: dict[str, tuple[int, slice]] = {}
    for stored, part in cut.items():
        if part.dim() != 2 or part.shape[1] != 1 or not stored.endswith(".weight"):
            return None
        first, last = int(part[0]), int(part[-1])
        if not torch.equal(part[:, 0], torch.arange(first, last + 1)) or first // out != last // out:
            return None
        found[stored.removesuffix(".weight")] = (first // out, slice(first % out, last % out + 1))
    return found if sum(rows.stop - rows.start for _, rows in found.values()) == experts * out else None
