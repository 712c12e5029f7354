"""Reads checkpoints whose weights are float8 values with scales beside them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Set

import torch
from torch import Tensor

from core.contracts import Checkpoint
from core.errors import CheckpointError, ConfigError
from core.layers import QuantizedTensor, float8_tensor
from core.quant_weights import located, wrong_with_scales
from core.spec import ModelSpec

logger = logging.getLogger("core_serve.quant_fp8")

SCALE_SUFFIX = {"fp8": "_scale_inv", "fbgemm_fp8": "_scale"}
IGNORED = ("activation_scale", "input_scale", "input_scale_ub")  # how activations would be rounded
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class FP8Method:
    """A `core.contracts.QuantMethod`. Raises ConfigError for what the config asks and this cannot do."""

    on_the_fly = False
    activations = "float"  # they are not rounded to 8 bits

    def __init__(self, spec: ModelSpec) -> None:
        config = spec.quantization_config or {}
        self.name = str(config["quant_method"])
        self.suffix = SCALE_SUFFIX[self.name]
        if config.get("expert_dtype", "fp8") != "fp8":
            raise ConfigError(f"{spec.path} has experts in {config['expert_dtype']!r}; this plugin reads 'fp8' only.")
        block = config.get("weight_block_size") if self.name == "fp8" else None
        if block is not None and (len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block)):
            raise ConfigError(f"{spec.path} has weight_block_size {block!r}; right is two positive numbers.")
        self.block: tuple[int, int] | None = (block[0], block[1]) if block is not None else None

    def tensors(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        logger.info("%s: activations stay in floats", self.name)
        names = checkpoint.tensor_names()
        known = set(names)
        for name in names:
            if name.rpartition(".")[2] in IGNORED:
                continue
            if name.endswith(self.suffix):
                if name.removesuffix(self.suffix) not in known:
                    raise CheckpointError(f"{located(checkpoint, name)} is the scale of a weight that is missing.")
                continue
            tensor = checkpoint.tensor(name)
            if tensor.dtype not in FLOAT8 and name + self.suffix in known:
                scale = located(checkpoint, name + self.suffix)
                raise CheckpointError(
                    f"{located(checkpoint, name)} is {tensor.dtype}; right beside {scale} is a type of 8 bit floats."
                )
            yield name, self._weight(checkpoint, name, tensor, known, dtype) if tensor.dtype in FLOAT8 else tensor

    def _weight(
        self, checkpoint: Checkpoint, name: str, values: Tensor, known: Set[str], dtype: torch.dtype
    ) -> QuantizedTensor:
        if values.dim() < 2:
            raise CheckpointError(
                f"{located(checkpoint, name)} has shape {list(values.shape)}; right is [..., out, in]."
            )
        if name + self.suffix not in known:
            raise CheckpointError(f"Tensor '{name + self.suffix}' is missing. {located(checkpoint, name)} needs it.")
        scales = checkpoint.tensor(name + self.suffix)
        problem = wrong_with_scales(scales)
        if problem is not None:
            raise CheckpointError(f"{located(checkpoint, name + self.suffix)} {problem}.")
        if scales.numel() == 1 and values.numel() > 1 and self.block is None:
            return float8_tensor(values, scales, None, dtype)
        block = self.block or (1, values.shape[-1])  # a row
        wanted = [*values.shape[:-2], *(-(-n // size) for n, size in zip(values.shape[-2:], block, strict=True))]
        if list(scales.shape) != wanted:
            raise CheckpointError(
                f"{located(checkpoint, name + self.suffix)} has shape {list(scales.shape)}; right for a weight of "
                f"{list(values.shape)} in blocks of {block[0]} x {block[1]} is {wanted}."
            )
        return float8_tensor(values, scales, block if self.block else None, dtype)

    def quantize(self, name: str, weight: Tensor) -> Tensor:
        raise NotImplementedError("fp8 reads checkpoints; it makes nothing small on the fly")
