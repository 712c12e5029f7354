"""Quantized weights on their way through transformers' loader, which renames, stacks and ties them as floats.

No second copy of the model ever exists: a tensor that was read is handed out once, one that was not is read when it is
asked for, and on the fly each weight is quantized as soon as it is whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from core.contracts import Checkpoint, QuantMethod
from core.layers import HalfTensor, QuantizedTensor
from core.quant_weights import kept_small, linear_weights, quantize_transposed, transposed_weights

EXPERT = re.compile(r"\.experts\.\d+\.")
NAME = "core_serve"  # of our quantizer among transformers'


class Held:
    """A tensor that is handed out once: the loader keeps its list of all of them to the end."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Tensor | None = tensor

    def __getitem__(self, whole: Any) -> Tensor:
        tensor, self._tensor = self._tensor, None
        assert tensor is not None, "a tensor was asked for twice"
        return tensor


class Unread:
    """A tensor that is read from the checkpoint when it is asked for.

    An expert that the loader will stack is quantized before it is: a layer's experts are never floats together.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, dtype: torch.dtype, config: OnTheFly) -> None:
        self._checkpoint, self._name, self._dtype, self._config = checkpoint, name, dtype, config

    def __getitem__(self, whole: Any) -> Tensor:
        tensor = self._checkpoint.tensor(self._name)
        if self._config.stacks_experts and EXPERT.search(self._name) and tensor.dim() == 2:
            return self._config.method.quantize(self._name, tensor.to(self._dtype))
        return kept_small(tensor, self._dtype)


def arguments_of(checkpoint: Checkpoint, method: QuantMethod, dtype: torch.dtype) -> dict[str, Any]:
    """Return what `from_pretrained(None, ...)` is to be given: `state_dict`, and on the fly our quantizer's config."""
    if not method.on_the_fly:
        return {
            "state_dict": {name: Held(kept_small(tensor, dtype)) for name, tensor in method.tensors(checkpoint, dtype)}
        }
    config = OnTheFly(method)
    state_dict = {name: Unread(checkpoint, name, dtype, config) for name in checkpoint.tensor_names()}
    return {"state_dict": state_dict, "quantization_config": config}


def settle(model: Any, device: torch.device) -> nn.Module:
    """Return a loaded module in eval mode on its device, without traces of our quantizer; tied weights stay tied."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    model.eval().requires_grad_(False)
    changed: dict[int, Tensor] = {}  # by id: tied weights stay tied
    for part in model.modules():
        for name, weight in part._parameters.items():
            if isinstance(weight, QuantizedTensor):
                if id(weight) not in changed:
                    changed[id(weight)] = _settled(weight, part, device)
                part._parameters[name] = changed[id(weight)]
    return model.to(device) if device.type != "cpu" else model


def _settled(weight: QuantizedTensor, part: nn.Module, device: torch.device) -> Tensor:
    """Move a weight; halves stay halves only where nothing but a product or a row is asked of them."""
    multiplied = isinstance(part, (nn.Linear, nn.Embedding)) or hasattr(part, "is_transposed")  # or a stack of experts
    kept = multiplied or not isinstance(weight, HalfTensor)
    found = weight.to(device) if kept else weight.dequantize().to(device)
    return found if found is weight else nn.Parameter(found, requires_grad=False)


# ------------------------------------------------------------------------------------------------ on the fly


class OnTheFly(QuantizationConfigMixin):
    """Names our quantizer to `from_pretrained`, and carries the method to it."""

    def __init__(self, method: QuantMethod) -> None:
        super().__init__(quant_method=NAME)
        self.method = method
        self.stacks_experts = False  # set once the module is made

    def __deepcopy__(self, memo: dict[int, Any]) -> OnTheFly:
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": NAME, "method": self.method.name}


class OnTheFlyQuantizer(HfQuantizer):
    """Quantizes the weights of linears and stacks of experts while they are loaded, one at a time."""

    requires_calibration = False

    def __init__(self, quantization_config: OnTheFly, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.method = quantization_config.method
        self.done: set[str] = set()
        self._linears: set[str] = set()
        self._transposed: set[str] = set()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._linears, self._transposed = linear_weights(model), transposed_weights(model)
        stacks = [name for name in self._linears - self._transposed if model.get_parameter(name).dim() == 3]
        self.quantization_config.stacks_experts = bool(stacks)
        return model

    def quantize(self, name: str, weight: Tensor) -> Tensor:
        if name in self._transposed:
            return quantize_transposed(self.method.quantize, name, weight)
        return self.method.quantize(name, weight)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """False once it is done: transformers compares shapes only of what needs no quantization."""
        return param_name in self._linears and param_name not in self.done

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class _Quantize(ConversionOps):
    def __init__(self, quantizer: OnTheFlyQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return dict(self._quantized(input_dict))

    def _quantized(self, tensors: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        for name in list(tensors):
            held = tensors.pop(name)
            weight = held[0] if isinstance(held, list) else held
            del held
            self.quantizer.done.add(name)
            if isinstance(weight, HalfTensor):
                weight = weight.dequantize()
            is_done = isinstance(weight, QuantizedTensor)  # a stack of experts
            yield name, weight if is_done else self.quantizer.quantize(name, weight)


AUTO_QUANTIZER_MAPPING.setdefault(NAME, OnTheFlyQuantizer)
AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(NAME, OnTheFly)
