"""Which of the plugin's methods, if any, do a checkpoint and --quantization ask for? Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError

if TYPE_CHECKING:
    from core.config import EngineConfig
    from core.contracts import QuantMethod
    from core.spec import ModelSpec

NAME = "bitsandbytes"
KINDS = ("nf4", "fp4", "int8")
ON_THE_FLY = {f"{NAME}-{kind}": kind for kind in KINDS}  # what --quantization accepts for a float checkpoint


def choose_method(spec: ModelSpec, options: EngineConfig) -> QuantMethod | None:
    """Return the method, None where it is not ours. Raises ConfigError where the two do not fit together."""
    stated, asked = spec.quantization_config, options.quantization
    ours = stated is not None and is_bitsandbytes(stated)
    if asked is None:
        return _reader() if ours else None
    if asked != NAME and asked not in ON_THE_FLY:
        return None
    if stated is None:
        return _quantizer(asked)
    _check_fits(spec, stated, asked)
    return _reader()


def is_bitsandbytes(stated: Mapping[str, Any]) -> bool:
    """True for a quantization_config of bitsandbytes; old ones have no quant_method."""
    named = stated.get("quant_method")
    return named == NAME if named else bool(stated.get("load_in_4bit") or stated.get("load_in_8bit"))


def kind_of(stated: Mapping[str, Any]) -> str:
    """Return which of KINDS a quantization_config of bitsandbytes says; its own default for 4 bit is fp4."""
    return str(stated.get("bnb_4bit_quant_type", "fp4")) if stated.get("load_in_4bit") else "int8"


def _check_fits(spec: ModelSpec, stated: Mapping[str, Any], asked: str) -> None:
    found = f"{NAME}-{kind_of(stated)}" if is_bitsandbytes(stated) else str(stated.get("quant_method"))
    if asked not in (NAME, found) or not is_bitsandbytes(stated):
        raise ConfigError(
            f"--quantization asks for {asked!r}, and {spec.path} is quantized with {found!r} already. "
            "Leave --quantization out, or give the float checkpoint."
        )


def _reader() -> QuantMethod:
    from core_quant_bnb.method import BnbCheckpoint

    return BnbCheckpoint()


def _quantizer(asked: str) -> QuantMethod:
    if asked == NAME:
        raise ConfigError(f"--quantization {NAME} does not say to what; choose {', '.join(ON_THE_FLY)}.")
    from core_quant_bnb.method import BnbOnTheFly

    return BnbOnTheFly(ON_THE_FLY[asked])
