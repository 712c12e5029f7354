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
    group_size: int | None = None  # -1: a whole row; None: not said, or not for all linears
    symmetric: bool = False  # every zero is the middle of the codes
    desc_act: bool = False  # columns are grouped in another order, which the file has to hold

    @classmethod
    def of(cls, stated: Mapping[str, Any], path: str) -> GptqSettings:
        """Read a config. Raises ConfigError naming what is not supported."""
        bits = stated.get("bits")
        if bits not in BITS:
            raise ConfigError(f"{path} is GPTQ with {bits} bits; supported: {' and '.join(map(str, BITS))}.")
        form = _format(stated)
        if form not in FORMATS:
            raise ConfigError(f"{path} is GPTQ of format {form!r}; supported: {', '.join(FORMATS)}.")
        size = stated.get("group_size")
        if size is not None and (type(size) is not int or (size < 1 and size != -1)):
            raise ConfigError(f"{path} states a GPTQ group size of {size!r}; right is -1 or a positive number.")
        differ = any(_has_own(stated.get(name)) for name in ("dynamic", "extra_config"))
        return cls(
            bits, FORMATS[form], None if differ else size, stated.get("sym") is True, stated.get("desc_act") is True
        )


def _has_own(overrides: object) -> bool:
    """True if some linears have settings of their own; an entry without any, or of a skipped one, says nothing."""
    entries = overrides.items() if isinstance(overrides, Mapping) else ()
    return any(value and not str(name).startswith("-:") for name, value in entries)


def is_gptq(stated: Mapping[str, Any]) -> bool:
    method = stated.get("quant_method")
    return method == "gptq" or (method == "auto-round" and _format(stated) in FORMATS)


def _format(stated: Mapping[str, Any]) -> str:
    if stated.get("quant_method") == "auto-round":
        return str(stated.get("packing_format", "auto_round"))
    named = [stated[name] for name in ("checkpoint_format", "format") if stated.get(name) is not None]
    return str(named[0] if named else "gptq")
