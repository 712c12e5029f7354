"""Weights that stay quantized: tensors that know how to become floats, a few rows at a time, and how to multiply.

A quantized tensor stands wherever a float weight would: as a module's parameter, in a list of experts that is stacked,
tied between embedding and head. `F.linear`, `F.embedding`, picking and joining rows work on the quantized parts; any
other operation sees the dequantized floats, so that no module computes something else because its weight is small.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import CoreError

if TYPE_CHECKING:
    from core.kernel_contracts import Kernels

AT_ONCE = 1 << 17  # weights that are floats at the same time where no kernel reads the quantized bytes


class QuantizedTensor(Tensor):
    """A weight [..., out, in] kept as parts; a subclass says what its parts mean.

    Every part has the weight's leading dimensions [..., out], so that rows are picked and joined part by part. What all
    rows share (bits, group size, a table) are `settings`; only tensors with equal settings are joined to one. A setting
    `order` of a stack may be [experts, in]: each expert has its own.
    The dtype is the one that modules see and that `dequantize` gives.
    """

    packing: str  # what kernels know the parts by, e.g. "affine4"; documented in docs/quantized-weights.md

    @staticmethod
    def __new__(
        cls: type[Self], parts: Mapping[str, Tensor], in_features: int, dtype: torch.dtype, **settings: Any
    ) -> Self:
        first = next(iter(parts.values()))
        shape = (*first.shape[:-1], in_features)
        made: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=first.device)
        return made

    def __init__(self, parts: Mapping[str, Tensor], in_features: int, dtype: torch.dtype, **settings: Any) -> None:
        rows = {part.shape[:-1] for part in parts.values()}
        assert len(rows) == 1, f"parts of different rows: { {name: list(part.shape) for name, part in parts.items()} }"
        self.parts = dict(parts)
        self.in_features = in_features
        self.settings = settings
        self.kernel: Callable[[Tensor], Tensor] | None = None  # x -> x @ weight.T
        self._experts: Callable[[int], QuantizedTensor] | None = (
            None  # of a stack: the one at an index, with its kernel
        )

    @abstractmethod
    def decode(self) -> Tensor:
        """Return the weight as float32 [..., out, in], bit for bit what the format says."""

    def dequantize(self) -> Tensor:
        """Return the weight as floats of its dtype, [..., out, in]."""
        return self.decode().to(self.dtype)

    @property
    def out_features(self) -> int:
        return self.shape[-2]

    @property
    def upright(self) -> QuantizedTensor:
        """This weight as [..., out, in]: itself, but for one that modules see transposed."""
        return self

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the parts take."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def remake(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the same kind of tensor with every part changed, its last dimension kept."""
        parts = {name: change(part) for name, part in self.parts.items()}
        return type(self)(parts, self.in_features, self.dtype, **self.settings)

    def with_order(self, order: Tensor | None) -> Self:
        """Return the same tensor with another setting `order`."""
        return type(self)(self.parts, self.in_features, self.dtype, **{**self.settings, "order": order})

    def as_dtype(self, dtype: torch.dtype) -> Self:
        """Return the same weight, seen as floats of another dtype."""
        return type(self)(self.parts, self.in_features, dtype, **self.settings)

    def joins(self, other: Tensor) -> bool:
        """True if rows of `other` can stand under rows of this one in one tensor."""
        if type(other) is not type(self) or not isinstance(other, QuantizedTensor):
            return False
        same = (self.in_features, self.dtype, set(self.parts)) == (other.in_features, other.dtype, set(other.parts))
        return same and self._parts_alike(other) and _equal_settings(self.settings, other.settings)

    def _parts_alike(self, other: QuantizedTensor) -> bool:
        pairs = [(part, other.parts[name]) for name, part in self.parts.items()]
        return all((a.dtype, a.shape[-1]) == (b.dtype, b.shape[-1]) for a, b in pairs)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias for x [..., in]; a bounded number of rows are floats at a time.

        The reference that kernels are compared with.
        """
        # Into one piece of memory: small pieces kept between large ones that come and go leave holes of hundreds of MB.
        out = x.new_empty(*x.shape[:-1], self.shape[0])
        count = max(AT_ONCE // self.in_features, 64)
        for start in range(0, self.shape[0], count):
            rows = slice(start, start + count)
            out[..., rows] = F.linear(x, self[rows].dequantize().to(x.dtype))
        return out if bias is None else out + bias

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}, {self.num_bytes:,} bytes, {self.settings})"

    # ------------------------------------------------------------------------------------------ torch's side

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(function)
        if handler is not None:
            found = handler(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        with torch._C.DisableTorchFunctionSubclass():  # results are plain tensors, not made to look like this class
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _SAME:
            return args[0].remake(lambda part: part)
        if function is torch.ops.aten.clone.default:
            return args[0].remake(Tensor.clone)
        if function is torch.ops.aten._to_copy.default:
            return _to_copy(args[0], **kwargs)
        _refuse_writing(function, args)
        return function(*_as_floats(args), **dict(zip(kwargs, _as_floats(kwargs.values()), strict=True)))


_SAME = frozenset({torch.ops.aten.detach.default, torch.ops.aten.alias.default})


def _refuse_writing(function: Any, args: Sequence[Any]) -> None:
    for argument, value in zip(function._schema.arguments, args, strict=False):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes and isinstance(value, QuantizedTensor):
            raise CoreError(f"{function} would write into a quantized weight {list(value.shape)}, which is read only.")


def _as_floats(values: Iterable[Any]) -> list[Any]:
    def floats(value: Any) -> Any:
        if isinstance(value, QuantizedTensor):
            return value.dequantize()
        return [floats(item) for item in value] if isinstance(value, (list, tuple)) else value

    return [floats(value) for value in values]


def _to_copy(weight: QuantizedTensor, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
    """Parts are read only, so that a weight of another dtype shares them."""
    moved = weight if device is None else weight.remake(lambda part: part.to(device))
    return moved.remake(lambda part: part) if dtype is None else moved.as_dtype(dtype)


def _equal_settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return set(one) == set(other) and all(_equal(value, other[name]) for name, value in one.items())


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


# ------------------------------------------------------------------------------------------------ what works on parts


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, QuantizedTensor) or weight.dim() != 2:
        return NotImplemented
    if weight.kernel is None:
        return weight.linear(x, bias)
    out = weight.kernel(x)
    return out if bias is None else out + bias


def _embedding(ids: Tensor, weight: Tensor, *args: Any, **options: Any) -> Any:
    if not isinstance(weight, QuantizedTensor):
        return NotImplemented
    return weight.remake(lambda part: part[ids.reshape(-1)]).dequantize().view(*ids.shape, weight.in_features)


def _pick(weight: Tensor, index: Any) -> Any:
    """Rows and experts are picked part by part; an index that reaches the last dimension is left to the floats."""
    if not isinstance(weight, QuantizedTensor) or not _keeps_rows_whole(index, weight.dim() - 1):
        return NotImplemented
    if weight._experts is not None and is_one(index):
        return weight._experts(int(index) % weight.shape[0])
    return _picked(weight, index)


def _picked(weight: QuantizedTensor, index: Any) -> Any:
    picked = weight.remake(lambda part: part[index])
    order = weight.settings.get("order")
    if order is None or order.dim() == 1:
        return picked
    experts, *rows = index if isinstance(index, tuple) else (index,)
    if rows and not is_one(experts) and not all(isinstance(one, slice) for one in rows):
        return NotImplemented  # rows of several experts, each with an order of its own
    return picked.with_order(order[experts])


def is_one(index: Any) -> bool:
    """True for an index that picks one of the first dimension: an int, or a tensor of one."""
    return isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point())


def _keeps_rows_whole(index: Any, leading: int) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    plain = all(isinstance(item, (int, slice, Tensor, list)) and not isinstance(item, bool) for item in items)
    masks = any(isinstance(item, Tensor) and item.dtype == torch.bool and item.dim() > 1 for item in items)
    return plain and not masks and len(items) <= leading


def _cat(tensors: Sequence[Tensor], dim: int = 0, **options: Any) -> Any:
    first = tensors[0]
    if not isinstance(first, QuantizedTensor) or dim in (-1, first.dim() - 1) or options:
        return NotImplemented
    if not all(first.joins(other) for other in tensors[1:]):
        return NotImplemented
    return _joined(torch.cat, first, tensors, dim if dim >= 0 else dim + first.dim())


def _stack(tensors: Sequence[Tensor], dim: int = 0, **options: Any) -> Any:
    first = tensors[0]
    if not isinstance(first, QuantizedTensor) or dim != 0 or options:
        return NotImplemented
    orders = [other.settings.get("order") for other in tensors if isinstance(other, QuantizedTensor)]
    if any(order is not None and order.dim() > 1 for order in orders):
        return NotImplemented
    if len(orders) == len(tensors) and not all(_equal(order, orders[0]) for order in orders):
        return _stack_of_orders(tensors, orders)
    if not all(first.joins(other) and other.shape == first.shape for other in tensors[1:]):
        return NotImplemented
    return _joined(torch.stack, first, tensors, 0)


def _stack_of_orders(tensors: Sequence[Any], orders: Sequence[Tensor | None]) -> Any:
    plain = [tensor.with_order(None) for tensor in tensors]
    stack = _stack(plain)
    if stack is NotImplemented:
        return NotImplemented
    in_place = torch.arange(stack.in_features, device=stack.device)
    return stack.with_order(torch.stack([in_place if order is None else order for order in orders]))


def _joined(join: Callable[..., Tensor], first: QuantizedTensor, tensors: Sequence[Any], dim: int) -> QuantizedTensor:
    parts = {name: join([tensor.parts[name] for tensor in tensors], dim=dim) for name in first.parts}
    return type(first)(parts, first.in_features, first.dtype, **first.settings)


def _detach(weight: Tensor) -> Any:
    """By itself, and not by __torch_dispatch__: for that torch imports its distributed tensors."""
    return weight.remake(lambda part: part) if isinstance(weight, QuantizedTensor) else NotImplemented


_HANDLERS: dict[Any, Callable[..., Any]] = {
    Tensor.detach: _detach,
    F.linear: _linear,
    F.embedding: _embedding,
    Tensor.__getitem__: _pick,
    torch.cat: _cat,
    torch.stack: _stack,
}


# ------------------------------------------------------------------------------------------------ stacks of experts


def give_kernels(model: nn.Module, kernels: Kernels | None) -> None:
    """Let the experts of every quantized stack, and transposed weights, multiply with kernels; None takes them away."""
    for weight in model.parameters():
        if not isinstance(weight, QuantizedTensor):
            continue
        upright = weight.upright
        if weight.dim() == 3:
            upright._experts = None if kernels is None else _experts_of(upright, kernels)
        elif upright is not weight:  # other matrices are those of linears, which ask for a kernel themselves
            upright.kernel = None if kernels is None else kernels.linear(upright, None)


def _experts_of(stack: QuantizedTensor, kernels: Kernels) -> Callable[[int], QuantizedTensor]:
    parts = stack.remake(lambda part: part)  # not the stack itself, which keeps this function

    @cache
    def expert(index: int) -> QuantizedTensor:
        one: QuantizedTensor = _picked(parts, index)
        one.kernel = kernels.linear(one, None)
        return one

    return expert


# ------------------------------------------------------------------------------------------------ layers


class QuantizedLinear(nn.Module):
    """y = x @ weight.T + bias on a kernel that reads the quantized bytes, on the reference where there is none."""

    def __init__(
        self, weight: QuantizedTensor, bias: Tensor | None, kernel: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is not None:
            return self.kernel(x)
        weight: Any = self.weight
        out: Tensor = weight.linear(x, self.bias)
        return out

    def extra_repr(self) -> str:
        return f"{self.weight!r}, kernel={'yes' if self.kernel else 'no'}"


def reads_on_device(model: nn.Module) -> bool:
    """True if every quantized weight of a model is multiplied with by a kernel: torch's way may read from the host."""
    for part in model.modules():
        quantized = any(isinstance(weight, QuantizedTensor) for weight in part._parameters.values())
        if quantized and not (isinstance(part, QuantizedLinear) and part.kernel is not None):
            return False
    return True
