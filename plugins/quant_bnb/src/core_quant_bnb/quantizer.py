"""Makes checkpoints that bitsandbytes reads, code by code what it makes itself: NF4, and LLM.int8. Needs no library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from core.contracts import QuantizeSettings
from core.errors import ConfigError
from core.quantize.layer import DecoderLayer
from core_quant_bnb import four_bit, int8

KIND = "nf4"


class BnbQuantizer:
    """A `core.contracts.Quantizer`: "bnb-nf4" without double quantization, or "bnb-int8"."""

    calibrates = sees_floats = False
    group_sizes = ()

    def __init__(self, name: str, settings: QuantizeSettings) -> None:
        if settings != QuantizeSettings():
            raise ConfigError(f"{name} has no settings; leave --group-size, --symmetric and --desc-act out.")
        self.name = name

    def quantize_layer(self, layer: DecoderLayer) -> Mapping[str, Mapping[str, Tensor]]:
        pack = _nf4 if self.name == "bnb-nf4" else _int8
        return {name: pack(linear.weight.data) for name, linear in layer.linears.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> Tensor:
        weight = tensors["weight"]
        if self.name == "bnb-int8":
            return int8.make_tensor(weight, tensors["SCB"], torch.float32).dequantize()
        state = json.loads(bytes(tensors[f"weight.quant_state.bitsandbytes__{KIND}"].tolist()))
        packed, (rows, columns) = weight.view(-1), state["shape"]
        codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)[: rows * columns].view(rows, columns)
        made = four_bit.make_tensor(
            codes, tensors["weight.absmax"], four_bit.table_of(KIND), state["blocksize"], torch.float32
        )
        return made.to(torch.float32) if type(made) is Tensor else made.dequantize()  # type: ignore[attr-defined]

    def config(self, in_floats: Sequence[str]) -> Mapping[str, Any]:
        four = self.name == "bnb-nf4"
        kind = (
            {"bnb_4bit_quant_type": KIND, "bnb_4bit_use_double_quant": False} if four else {"llm_int8_threshold": 6.0}
        )
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "llm_int8_skip_modules": list(in_floats),
            **kind,
        }


def _nf4(weight: Tensor) -> Mapping[str, Tensor]:
    codes, absmax = four_bit.quantize_flat(weight.reshape(-1).float(), KIND, four_bit.BLOCK)
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    state = {"quant_type": KIND, "blocksize": four_bit.BLOCK, "dtype": "float32", "shape": list(weight.shape)}
    return {
        "weight": (codes[0::2] << 4 | codes[1::2])[:, None].contiguous(),
        "weight.absmax": absmax,
        "weight.quant_map": four_bit.table_of(KIND),
        f"weight.quant_state.bitsandbytes__{KIND}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def _int8(weight: Tensor) -> Mapping[str, Tensor]:
    made = int8.quantize(weight)
    return {
        "weight": (made.parts["codes"] ^ 128).view(torch.int8),
        "SCB": made.parts["absmax"].flatten().contiguous(),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
