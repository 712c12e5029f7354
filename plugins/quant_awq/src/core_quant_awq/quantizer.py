"""Makes AWQ checkpoints (Lin et al. 2023): scales that spare the weights which matter, folded away; clips; rounding."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from core.contracts import QuantizeSettings
from core.quantize.layer import DecoderLayer, InputGroup
from core_quant_awq.absorb import apply_scale, find_absorber
from core_quant_awq.rounding import Rounding
from core_quant_awq.search import best_clip, best_scale, clip_groups

logger = logging.getLogger("core_serve.quant_awq")


class AWQQuantizer:
    """4 bits, zero points unless `symmetric`, in AutoAWQ's "gemm" packing."""

    name = "awq"
    calibrates = True

    def __init__(self, settings: QuantizeSettings) -> None:
        self.group_size = settings.group_size or 128
        self.rounding = Rounding(self.group_size, bool(settings.symmetric))

    def quantize_layer(self, layer: DecoderLayer) -> Mapping[str, Mapping[str, Tensor]]:
        groups = layer.input_groups()
        for group in groups:
            self._scale(layer, group)
        grams = {name: group.gram for group in groups for name in group.names}
        return {name: self._round(linear.weight.data, grams.get(name)) for name, linear in layer.linears.items()}

    def _scale(self, layer: DecoderLayer, group: InputGroup) -> None:
        absorber = find_absorber(layer, group)
        if absorber is None:
            logger.info("%s: nothing absorbs a scale of %s", layer.name, ", ".join(group.names))
            return
        linears = [layer.linears[name] for name in group.names]
        weights = [linear.weight.data.float() for linear in linears]
        scale = best_scale(weights, group.gram, group.mean_abs, absorber.gather, absorber.spread, self.rounding)
        if scale is not None:
            apply_scale(linears, absorber, scale)
            inputs = absorber.spread(scale)
            group.gram = group.gram / inputs / inputs[:, None]

    def _round(self, weight: Tensor, gram: Tensor | None) -> Mapping[str, Tensor]:
        if gram is not None:
            weight = best_clip(weight.float(), gram, self.group_size, self._round_clipped)
        codes, scales, zeros = self.rounding.codes(weight)
        return {"codes": codes, "scales": scales, "zeros": zeros}

    def _round_clipped(self, weight: Tensor, share: float) -> Tensor:
        return self.rounding(clip_groups(weight, share, self.group_size))

    def restore(self, t: Mapping[str, Tensor]) -> Tensor:
        g = t["codes"].unflatten(1, (-1, self.group_size)) - t["zeros"].unsqueeze(-1)
        return (g * t["scales"].float().unsqueeze(-1)).flatten(1)
