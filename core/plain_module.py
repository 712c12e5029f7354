"""A checkpoint's own transformers module in floats, by transformers' own loader: what everything is compared with.

Quantized weights come as the floats that they stand for.
"""

from __future__ import annotations

from typing import Any

import torch

from core.contracts import Checkpoint, QuantMethod
from core.layers import QuantizedTensor
from core.quant_weights import by_transformers, round_weights
from core.spec import ModelSpec


def plain_module(
    checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool = False, method: QuantMethod | None = None
) -> Any:
    """Load the module on the CPU. Raises whatever transformers raises for a checkpoint that does not fit."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    spec = checkpoint.spec
    if method is not None and by_transformers(method):
        method = None
    remote = {"trust_remote_code": True} if trust_remote_code and spec.auto_map else {}
    if spec.format == "hf" and (method is None or method.on_the_fly):
        module = _model_class(spec).from_pretrained(str(spec.path), dtype=dtype, **remote)
    else:
        module = _from_tensors(checkpoint, dtype, remote, method)
    if method is not None and method.on_the_fly:
        round_weights(module, method.quantize)
    return module.eval()


def _from_tensors(
    checkpoint: Checkpoint, dtype: torch.dtype, remote: dict[str, bool], method: QuantMethod | None
) -> Any:
    stream = checkpoint.tensors() if method is None else method.tensors(checkpoint, dtype)
    tensors = {name: tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor for name, tensor in stream}
    config = _config(checkpoint.spec, remote)
    model_class = _model_class(checkpoint.spec)
    reference = checkpoint.spec.auto_map.get("AutoModelForCausalLM")
    if reference and remote:  # Auto reads such a class only beside weights of its own
        import transformers

        model_class = transformers.dynamic_module_utils.get_class_from_dynamic_module(
            reference, str(checkpoint.spec.path)
        )
    return model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)


def _config(spec: ModelSpec, remote: dict[str, bool]) -> Any:
    import transformers

    if spec.format != "hf":
        values = {name: value for name, value in spec.config.items() if name != "model_type"}
        return transformers.AutoConfig.for_model(spec.model_type, **values)
    config = transformers.AutoConfig.from_pretrained(str(spec.path), **remote)
    for one in (config, config.get_text_config()):
        if hasattr(one, "quantization_config"):
            del one.quantization_config
    return config


def _model_class(spec: ModelSpec) -> Any:
    """The class that saved the checkpoint: the Auto class does not map every text config."""
    import transformers

    named = getattr(transformers, spec.architecture, None) if spec.architecture and not spec.auto_map else None
    is_model = isinstance(named, type) and hasattr(named, "generate")
    return named if is_model else transformers.AutoModelForCausalLM
