"""Makes AWQ checkpoints (Lin et al. 2023): scales that spare the weights which matter, folded away; clips; rounding.

Within the range that its clip leaves a group, a column is rounded so that it makes good what those before it cost
(Frantar et al. 2022): the format asks for no way of rounding, and this one moves the outputs least.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from core.contracts import QuantizeSettings
from core.errors import ConfigError
from core.layers import unpack_codes
from core.quantize.layer import DecoderLayer, InputGroup
from core_quant_awq.absorb import apply_scale, find_absorber
from core_quant_awq.packing import codes_of_gemm, rows_of_gemm, words_of_rows
from core_quant_awq.rounding import Rounding, codes_with_feedback
from core_quant_awq.search import best_clip, best_scale, clip_groups

logger = logging.getLogger("core_serve.quant_awq")


class AwqQuantizer:
    """A `core.contracts.Quantizer`: 4 bits, zero points, in AutoAWQ's gemm packing. Needs no library."""

    name = "awq"
    calibrates = sees_floats = True
    group_sizes = (-1, 16, 32, 64, 128)

    def __init__(self, settings: QuantizeSettings) -> None:
        if settings.symmetric or settings.desc_act is not None:
            raise ConfigError("awq has zero points and no order of columns; leave --symmetric and --desc-act out.")
        self.group_size = settings.group_size or 128

    def quantize_layer(self, layer: DecoderLayer) -> Mapping[str, Mapping[str, Tensor]]:
        """Scale every group of linears that something can absorb the scale of; then clip and round each linear."""
        groups = layer.input_groups()
        for group in groups:
            self._scale(layer, group)
        grams = {name: group.gram for group in groups for name in group.names}
        packable = {name: linear for name, linear in layer.linears.items() if linear.out_features % 8 == 0}
        return {name: self._packed(linear.weight.data.float(), grams.get(name)) for name, linear in packable.items()}

    def _rounding(self, width: int) -> Rounding:
        return Rounding(width if self.group_size == -1 else self.group_size)

    def _scale(self, layer: DecoderLayer, group: InputGroup) -> None:
        absorber = find_absorber(layer, group)
        if absorber is None:
            logger.info("%s: nothing absorbs a scale of %s", layer.name, ", ".join(group.names))
            return
        linears = [layer.linears[name] for name in group.names]
        weights = [linear.weight.data.float() for linear in linears]
        rounding = self._rounding(weights[0].shape[1])
        scale = best_scale(weights, group.gram, group.mean_abs, absorber.gather, absorber.spread, rounding)
        if scale is not None:
            apply_scale(linears, absorber, scale)
            inputs = absorber.spread(scale)
            group.gram = group.gram / inputs / inputs[:, None]
            logger.info("%s: %s absorbs the scale of %s", layer.name, absorber.name, ", ".join(group.names))

    def _packed(self, weight: Tensor, gram: Tensor | None) -> Mapping[str, Tensor]:
        rounding = self._rounding(weight.shape[1])
        if gram is None:
            codes, scales, zeros = rounding.codes(weight)
        else:

            def round_clipped(weight: Tensor, share: float) -> Tensor:
                return rounding(clip_groups(weight, share, rounding.group_size))

            _, scales, zeros = rounding.codes(best_clip(weight, gram, rounding.group_size, round_clipped))
            codes = codes_with_feedback(weight, gram, scales, zeros)
        return {
            "qweight": words_of_rows(codes.T.contiguous()),
            "qzeros": words_of_rows(zeros.T.contiguous()),
            "scales": scales.T.contiguous(),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> Tensor:
        codes = unpack_codes(codes_of_gemm(tensors["qweight"]), 4).float()
        zeros, scales = rows_of_gemm(tensors["qzeros"]).T.float(), tensors["scales"].T.float()
        grouped = codes.unflatten(1, (zeros.shape[1], -1)) - zeros.unsqueeze(-1)
        return (grouped * scales.unsqueeze(-1)).flatten(1)

    def config(self, in_floats: Sequence[str]) -> Mapping[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(in_floats),
        }
