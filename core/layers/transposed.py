"""Quantized weights of modules that keep them input first: GPT-2's Conv1D, the experts of gpt-oss and Llama 4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from core.layers.quantized import QuantizedTensor, is_one


class TransposedTensor(QuantizedTensor):
    """A weight that modules see as [..., in, out]; its parts are those of `upright`, a weight [..., out, in].

    Products with it and the choice of one expert work on the quantized parts; anything else sees floats.
    Setting: `kind`, the class of `upright`; the other settings are upright's.
    """

    packing = "transposed"
    _upright: QuantizedTensor | None = None

    @staticmethod
    def __new__(
        cls: type[Self], parts: Mapping[str, Tensor], in_features: int, dtype: torch.dtype, **settings: Any
    ) -> Self:
        first = next(iter(parts.values()))
        shape = (*first.shape[:-2], in_features, first.shape[-2])
        made: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=first.device)
        return made

    @classmethod
    def of(cls, upright: QuantizedTensor) -> Self:
        made = cls(upright.parts, upright.in_features, upright.dtype, kind=type(upright), **upright.settings)
        made._upright = upright
        return made

    @property
    def upright(self) -> QuantizedTensor:
        if self._upright is None:
            settings = {name: value for name, value in self.settings.items() if name != "kind"}
            self._upright = self.settings["kind"](self.parts, self.in_features, self.dtype, **settings)
        return self._upright

    @property
    def out_features(self) -> int:
        return self.shape[-1]

    def decode(self) -> Tensor:
        return self.upright.decode().transpose(-1, -2)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = None if kwargs else _HANDLERS.get(function)
        found = NotImplemented if handler is None else handler(*args)
        if found is not NotImplemented:
            return found
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def _matmul(x: Tensor, weight: Tensor) -> Any:
    """X [..., in] @ weight [in, out]."""
    if not isinstance(weight, TransposedTensor) or weight.dim() != 2:
        return NotImplemented
    return F.linear(x, weight.upright)


def _addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Any:
    if not isinstance(weight, TransposedTensor):
        return NotImplemented
    return F.linear(x, weight.upright, bias)


def _bmm(x: Tensor, weight: Tensor) -> Any:
    """X [experts, n, in], weight [experts, in, out]."""
    if not isinstance(weight, TransposedTensor):
        return NotImplemented
    return torch.stack([F.linear(rows, weight.upright[expert]) for expert, rows in enumerate(x)])


def _pick(weight: Tensor, index: Any) -> Any:
    if not isinstance(weight, TransposedTensor) or weight.dim() != 3 or not is_one(index):
        return NotImplemented
    one = weight.upright[index]
    assert isinstance(one, QuantizedTensor)
    return TransposedTensor.of(one)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _pick,
    Tensor.__matmul__: _matmul,
    Tensor.matmul: _matmul,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.addmm: _addmm,
    torch.bmm: _bmm,
}
