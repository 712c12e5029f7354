"""What a quantization_config says of an AWQ checkpoint. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ConfigError

AUTO_ROUND = "auto_round:auto_awq"
# The packing that a version is in; AutoAWQ's own kernels for one packing have several names.
PACKINGS = {"gemm": "gemm", "ipex": "gemm", "gemv": "gemv", "gemv_fast": "gemv_fast", "llm-awq": "gemv_fast"}


@dataclass(frozen=True)
class AwqSettings:
    packing: str  # gemm, gemv or gemv_fast
    group_size: int | None  # weights of a row that share a scale; None: the whole row
    zero_point: bool

    @classmethod
    def of(cls, stated: Mapping[str, Any], path: str) -> AwqSettings:
        """Read a config. Raises ConfigError naming what is not supported."""
        bits = stated.get("bits", stated.get("w_bit", 4))
        if bits != 4:
            raise ConfigError(f"{path} is AWQ with {bits} bits; only 4 are supported.")
        version = _version(stated)
        if version not in PACKINGS:
            raise ConfigError(f"{path} is AWQ of version {version!r}; supported: {', '.join(PACKINGS)}.")
        group_size = stated.get("group_size", stated.get("q_group_size", 128))
        if type(group_size) is not int or (group_size < 1 and group_size != -1):
            raise ConfigError(f"{path} states an AWQ group size of {group_size!r}; right is -1 or a positive number.")
        symmetric = stated.get("sym") is True  # auto-round's word
        return cls(
            PACKINGS[version], None if group_size == -1 else group_size, bool(stated.get("zero_point", not symmetric))
        )


def is_awq(stated: Mapping[str, Any]) -> bool:
    return stated.get("quant_method") == "awq" or _is_auto_round(stated)


def _is_auto_round(stated: Mapping[str, Any]) -> bool:
    return stated.get("quant_method") == "auto-round" and stated.get("packing_format") == AUTO_ROUND


def _version(stated: Mapping[str, Any]) -> str:
    if _is_auto_round(stated):
        return "gemm"
    if stated.get("backend") == "llm-awq":
        return "llm-awq"
    named = [stated[name] for name in ("version", "format") if stated.get(name) is not None]
    return str(named[0] if named else "gemm").lower()
