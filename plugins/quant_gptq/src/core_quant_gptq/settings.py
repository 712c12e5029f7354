"""What a quantization_config says of a GPTQ checkpoint. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ConfigError

BITS = (4, 8)
# Zeros are stored less one in v1. auto-round's own packing has no such offset.
FORMATS = {"gptq": 1, "gptq_v2": 0, "auto_round:auto_gptq": 1, "auto_round:gptqmodel": 0, "auto_round": 0}


@dataclass(frozen=True)
class GptqSettings:
    bits: int  # where nothing in the file says otherwise
    zero_offset: int  # what the file's zeros are short of

    @classmethod
    def of(cls, stated: Mapping[str, Any], path: str) -> GptqSettings:
        """Read a config. Raises ConfigError naming what is not supported."""
        bits = stated.get("bits")
        if bits not in BITS:
            raise ConfigError(f"{path} is GPTQ with {bits} bits; supported: {' and '.join(map(str, BITS))}.")
        form = _format(stated)
        if form not in FORMATS:
            raise ConfigError(f"{path} is GPTQ of format {form!r}; supported: {', '.join(FORMATS)}.")
        return cls(bits, FORMATS[form])


def is_gptq(stated: Mapping[str, Any]) -> bool:
    method = stated.get("quant_method")
    return method == "gptq" or (method == "auto-round" and _format(stated) in FORMATS)


def _format(stated: Mapping[str, Any]) -> str:
    if stated.get("quant_method") == "auto-round":
        return str(stated.get("packing_format", "auto_round"))
    return str(stated.get("checkpoint_format") or stated.get("format") or "gptq")
