"""Makes weight-only checkpoints that many engines read: 4 or 8 bits, rounded to nearest, in pack-quantized form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from core.contracts import QuantizeSettings
from core.errors import ConfigError
from core.quantize.layer import DecoderLayer
from core_quant_compressed_tensors.layout import build_weight
from core_quant_compressed_tensors.scheme import Scheme

SHRINKS = tuple(1 - 0.05 * step for step in range(9))  # of the range of a group: a clip may cost less than it gains


class IntQuantizer:
    """A `core.contracts.Quantizer`. Each group takes the range, of a few, that rounds its weights best."""

    calibrates = sees_floats = False
    group_sizes = (-1, 16, 32, 64, 128)

    def __init__(self, bits: int, settings: QuantizeSettings) -> None:
        if settings.desc_act is not None:
            raise ConfigError(f"int{bits} knows no order of columns; leave --desc-act out.")
        self.bits, self.name = bits, f"int{bits}"
        self.symmetric = settings.symmetric is not False
        self.group_size = settings.group_size or 128

    def quantize_layer(self, layer: DecoderLayer) -> Mapping[str, Mapping[str, Tensor]]:
        return {name: self.pack(linear.weight.data) for name, linear in layer.linears.items()}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the parts that a file holds of a weight [out, in]."""
        size = weight.shape[1] if self.group_size == -1 else self.group_size
        grouped = weight.float().unflatten(1, (-1, size))
        codes, scales, zeros = self._best(grouped)
        parts = {
            "weight_packed": pack_int32(codes.flatten(1), self.bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not self.symmetric:
            parts["weight_zero_point"] = pack_int32(zeros.T.contiguous(), self.bits).T.contiguous()
        return parts

    def _best(self, grouped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes [out, groups, size], scales and zeros [out, groups] with the least squared error of a few."""
        best: tuple[Tensor, Tensor, Tensor] | None = None
        least = torch.zeros(())
        for shrink in SHRINKS:
            found = self._rounded(grouped, shrink)
            codes, scales, zeros = found
            error = ((codes - zeros[..., None]) * scales[..., None] - grouped).square().sum(-1)
            if best is None:
                best, least = found, error
                continue
            better = error < least
            least = torch.where(better, error, least)
            chosen = [torch.where(better, new, old) for new, old in zip(found[1:], best[1:], strict=True)]
            best = (torch.where(better[..., None], codes, best[0]), chosen[0], chosen[1])
        assert best is not None
        return best

    def _rounded(self, grouped: Tensor, shrink: float) -> tuple[Tensor, Tensor, Tensor]:
        most, half = (1 << self.bits) - 1, float(1 << (self.bits - 1))
        if self.symmetric:
            scales = grouped.abs().amax(-1) * shrink / (half - 0.5)
            zeros = torch.full_like(scales, half)
        else:
            low, high = grouped.amin(-1).clamp(max=0) * shrink, grouped.amax(-1).clamp(min=0) * shrink
            scales = (high - low) / most
            zeros = (-low / scales.clamp(torch.finfo(torch.float32).tiny)).round().clamp(0, most)
        scales = scales.clamp(torch.finfo(torch.float32).tiny)
        codes = (grouped / scales[..., None]).round() + zeros[..., None]
        return codes.clamp(0, most), scales, zeros

    def restore(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return build_weight(tensors, self._scheme(), torch.float32).dequantize()

    def _scheme(self) -> Scheme:
        grouped = self.group_size != -1
        strategy, size = ("group", self.group_size) if grouped else ("channel", None)
        return Scheme("group_0", ("Linear",), self.bits, False, strategy, size, None, self.symmetric, False, True)

    def config(self, in_floats: Sequence[str]) -> Mapping[str, Any]:
        scheme = self._scheme()
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": scheme.strategy,
            "group_size": scheme.group_size,
            "dynamic": False,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": list(in_floats),
        }


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, n], each below 2 ** bits -> int32 [rows, ceil(n * bits / 32)], the first in the lowest bits."""
    per_word = 32 // bits
    missing = -codes.shape[1] % per_word
    words = torch.nn.functional.pad(codes.to(torch.int64), (0, missing)).unflatten(1, (-1, per_word))
    shifts = torch.arange(per_word, device=codes.device) * bits
    whole = (words << shifts).sum(-1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)
