"""Quantized checkpoints as streams of weights: what quantization plugins build on, and what loaders of models take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from core.contracts import Checkpoint, QuantMethod
from core.errors import CheckpointError
from core.layers import HalfTensor, QuantizedTensor, TransposedTensor

if TYPE_CHECKING:
    from core.model_loader import BuildContext
    from core.spec import ModelSpec


def weight_stream(
    checkpoint: Checkpoint, context: BuildContext, linears: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Yield every (name, tensor) on the context's device, under a float checkpoint's names, one in memory at a time.

    Weights are QuantizedTensors where the context has a quantization method. On the fly, those named in `linears` are.
    """
    method = context.quant_method
    if method is None:
        yield from checkpoint.tensors()
        return
    for name, tensor in method.tensors(checkpoint, context.dtype):
        if method.on_the_fly and name in linears:
            yield name, method.quantize(name, tensor.to(context.device, context.dtype))
        else:
            yield name, kept_small(tensor.to(context.device), context.dtype)


def kept_small(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a matrix of halves seen as float32, where that is the model's dtype; any other tensor as it is."""
    halves = tensor.dtype in (torch.float16, torch.bfloat16) and not isinstance(tensor, QuantizedTensor)
    if not halves or dtype != torch.float32 or tensor.dim() < 2:
        return tensor
    return HalfTensor({"values": tensor}, tensor.shape[-1], dtype)


def by_transformers(method: QuantMethod) -> bool:
    """True if only transformers' own loader builds the quantized layers, so that no other implementation can serve."""
    return bool(getattr(method, "by_transformers", False))


def says_nothing(name: str, tensor: Tensor) -> bool:
    """True for a bias of zeros: some formats store one for every linear, also for those that have none."""
    return name.endswith(".bias") and not bool(tensor.any())


def by_module(names: Iterable[str], parts: Collection[str]) -> tuple[dict[str, set[str]], list[str]]:
    """Sort a checkpoint's names: module -> which of `parts` it has ("qweight", "scales"); and all other names.

    >>> by_module(["a.q.qweight", "a.q.scales", "a.q.bias"], ("qweight", "scales"))
    ({'a.q': {'qweight', 'scales'}}, ['a.q.bias'])
    """
    modules: dict[str, set[str]] = {}
    others = []
    for name in names:
        module, _, part = name.rpartition(".")
        if part in parts:
            modules.setdefault(module, set()).add(part)
        else:
            others.append(name)
    return modules, others


def read_part(
    checkpoint: Checkpoint, name: str, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Read a tensor of a format's own. Raises CheckpointError naming file and tensor for another shape or dtype."""
    tensor = checkpoint.tensor(name)
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(f"{located(checkpoint, name)} has shape {list(tensor.shape)}; right is {list(shape)}.")
    if dtype is not None and tensor.dtype != dtype:
        raise CheckpointError(f"{located(checkpoint, name)} is {tensor.dtype}; right is {dtype}.")
    return tensor


def read_scales(checkpoint: Checkpoint, name: str, shape: Sequence[int] | None = None) -> Tensor:
    """Read what weights are multiplied with: floats, all of them finite. Raises CheckpointError like `read_part`."""
    tensor = read_part(checkpoint, name, shape)
    problem = wrong_with_scales(tensor)
    if problem is not None:
        raise CheckpointError(f"{located(checkpoint, name)} {problem}.")
    return tensor


def wrong_with_scales(scales: Tensor) -> str | None:
    """Say what is wrong with scales, None if nothing is."""
    if not scales.is_floating_point():
        return f"is {scales.dtype}; right is a type of floats"
    if not bool(scales.float().isfinite().all()):
        return "holds numbers that are not finite"
    return None


def as_its_module_has_it(spec: ModelSpec, weight: Tensor) -> Tensor:
    """Return a linear's quantized weight [out, in] as the model's module sees it.

    Quantized files have [out, in] for every linear, also for GPT-2's Conv1D, whose float weights are [in, out].
    """
    if spec.model_type not in CONV1D_TYPES or weight.dim() != 2:
        return weight
    return TransposedTensor.of(weight) if isinstance(weight, QuantizedTensor) else weight.T.contiguous()


def located(checkpoint: Checkpoint, name: str) -> str:
    """Return "Tensor 'name' of FILE", for messages."""
    file_of = getattr(checkpoint, "file_of", None)  # of checkpoints that have several files
    return f"Tensor {name!r} of {file_of(name) if file_of else checkpoint.spec.path}"


# ------------------------------------------------------------------------------------------------ on the fly


# Classes that keep weights input first, beside the stacks of experts that say so themselves.
CONV1D = "transformers.pytorch_utils.Conv1D"
TRANSPOSED = {CONV1D, "transformers.models.llama4.modeling_llama4.Llama4TextExperts"}
CONV1D_TYPES = frozenset({"gpt2", "imagegpt", "openai-gpt", "decision_transformer"})  # all of whose linears are Conv1Ds


def linear_weights(model: nn.Module) -> set[str]:
    """Return the names of a module tree's weights that its linears, or its stacks of experts, multiply.

    They are [..., out, in], but for those that `transposed_weights` names. The head is left out, as most sensitive of
    all and often one with the embedding; so is whatever computes something of its own with a weight.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    skip = {*tied.keys(), *tied.values()}
    linears = [(path, part) for path, part in model.named_modules() if _is_plain_linear(part) and part is not head]
    found = {f"{path}.weight" for path, part in linears}
    for path, part in model.named_modules():
        found |= {f"{path}.{name}" for name in stacks_of_experts(part)}
    return (found | transposed_weights(model)) - skip


def transposed_weights(model: nn.Module) -> set[str]:
    """Return the names of a module tree's weights [..., in, out] that it multiplies with."""
    parts = [(path, part) for path, part in model.named_modules() if _is_transposed(part)]
    weights = [
        (f"{path}.{name}", weight) for path, part in parts for name, weight in part.named_parameters(recurse=False)
    ]
    return {name for name, weight in weights if weight.dim() == 3 or name.endswith(".weight")}


def _is_transposed(part: nn.Module) -> bool:
    marked = getattr(part, "is_transposed", None) is True and hasattr(part, "has_gate")
    return marked or _class_name(part) in TRANSPOSED


def is_conv1d(part: nn.Module) -> bool:
    return _class_name(part) == CONV1D


def _class_name(part: nn.Module) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"


def quantize_transposed(quantize: Callable[[str, Tensor], Tensor], name: str, weight: Tensor) -> Tensor:
    """Quantize a weight [..., in, out], one expert at a time; one that `quantize` leaves as it is stays so."""
    experts = [quantize(name, one.T.contiguous()) for one in (weight if weight.dim() == 3 else weight[None])]
    upright = torch.stack(experts) if weight.dim() == 3 else experts[0]
    return TransposedTensor.of(upright) if isinstance(upright, QuantizedTensor) else weight


def _is_plain_linear(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) and type(part).forward is nn.Linear.forward


def stacks_of_experts(part: nn.Module) -> list[str]:
    """Return the names of a module's own parameters [experts, out, in].

    transformers marks the classes that multiply with one expert after the other.
    """
    if getattr(part, "is_transposed", True) is not False or not hasattr(part, "has_gate"):
        return []
    return [name for name, weight in part.named_parameters(recurse=False) if weight.dim() == 3]


@torch.no_grad()
def round_weights(model: nn.Module, quantize: object) -> None:
    """Put each linear's weight at the place where quantizing it on the fly would, as floats."""
    assert callable(quantize)
    transposed = transposed_weights(model)
    for name in sorted(linear_weights(model)):
        weight = model.get_parameter(name)
        found = weight.detach()
        weight.copy_(quantize_transposed(quantize, name, found) if name in transposed else quantize(name, found))
