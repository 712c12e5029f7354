"""Reads checkpoints of llm-compressor as a stream of plain and quantized weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from core.contracts import Checkpoint
from core.errors import CheckpointError, ConfigError
from core.layers import QuantizedTensor
from core.quant_weights import as_its_module_has_it, by_module, located
from core.spec import ModelSpec
from core_quant_compressed_tensors.layout import Misfit, build_weight
from core_quant_compressed_tensors.scheme import matches, read_schemes, scheme_of

logger = logging.getLogger("core_serve.quant_compressed_tensors")

WEIGHT_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
ACTIVATION_PARTS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
CACHE_PARTS = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point")
UNREAD_PARTS = ("weight_global_scale", "input_global_scale")


class CompressedTensorsMethod:
    """A `core.contracts.QuantMethod`. Raises ConfigError for what the config asks and this cannot do."""

    name = "compressed-tensors"
    on_the_fly = False
    activations = "float"  # W8A8 and FP8 checkpoints: weights are read as they are, activations are not rounded

    def __init__(self, spec: ModelSpec) -> None:
        config = spec.quantization_config or {}
        self.schemes = read_schemes(config, spec.path)
        self.ignored = tuple(config.get("ignore") or ())
        self.quantizes_cache = bool(config.get("kv_cache_scheme"))

    def tensors(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        self._say()
        names = checkpoint.tensor_names()
        modules, others = by_module(names, WEIGHT_PARTS)
        for name in others:
            module, _, part = name.rpartition(".")
            if part in UNREAD_PARTS:
                raise ConfigError(f"{located(checkpoint, name)} belongs to a format that this plugin does not read.")
            if (part == "weight" and module in modules) or part in ACTIVATION_PARTS:
                continue
            if part in CACHE_PARTS and self.quantizes_cache:
                continue
            yield name, _not_quantized(checkpoint, name)
        held = set(names)
        for module, parts in modules.items():
            if f"{module}.weight" in held:
                parts = parts | {"weight"}
            weight = self._weight(checkpoint, module, parts, dtype)
            yield f"{module}.weight", as_its_module_has_it(checkpoint.spec, weight)

    def _say(self) -> None:
        if any(scheme.quantizes_inputs for scheme in self.schemes):
            logger.warning("compressed-tensors: made for 8 bit activations; they stay in floats here")
        if self.quantizes_cache:
            logger.warning("compressed-tensors: made for an 8 bit K/V cache; it stays in floats here")

    def _weight(self, checkpoint: Checkpoint, module: str, parts: set[str], dtype: torch.dtype) -> QuantizedTensor:
        example = f"{module}.{sorted(parts)[0]}"
        if matches(module, self.ignored):
            raise CheckpointError(f"{located(checkpoint, example)} is quantized, and the config ignores its module.")
        scheme = scheme_of(module, self.schemes)
        if scheme is None:
            raise CheckpointError(f"{located(checkpoint, example)} is quantized, and no config group targets it.")
        try:
            return build_weight({part: checkpoint.tensor(f"{module}.{part}") for part in parts}, scheme, dtype)
        except Misfit as problem:
            group = f"group {scheme.group!r} of the config"
            name = f"{module}.{problem.part}"
            if problem.part in parts:
                raise CheckpointError(f"{located(checkpoint, name)} {problem} ({group}).") from problem
            raise CheckpointError(
                f"Tensor {name!r} {problem}. {located(checkpoint, example)} needs it ({group})."
            ) from problem

    def quantize(self, name: str, weight: Tensor) -> Tensor:
        raise NotImplementedError("compressed-tensors reads checkpoints; it makes nothing small on the fly")


def _not_quantized(checkpoint: Checkpoint, name: str) -> Tensor:
    tensor = checkpoint.tensor(name)
    if name.endswith(".weight") and tensor.dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
        raise CheckpointError(f"{located(checkpoint, name)} is {tensor.dtype} and has no weight_scale beside it.")
    return tensor
