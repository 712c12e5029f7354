"""The bitsandbytes plugin: reads its checkpoints and quantizes as it does. Holds hooks only; imports lazily."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.hookspecs import hookimpl

if TYPE_CHECKING:
    from core.config import EngineConfig
    from core.contracts import Quantizer, QuantizeSettings, QuantMethod
    from core.spec import ModelSpec

CORE_API = (1, 0)  # the version of core's API that this plugin was written for


@hookimpl
def provide_quant_method(spec: ModelSpec, options: EngineConfig) -> QuantMethod | None:
    """Answer for a checkpoint that bitsandbytes made, and for --quantization bitsandbytes-nf4, -fp4 and -int8."""
    from core_quant_bnb.choice import choose_method

    return choose_method(spec, options)


@hookimpl
def provide_quantizer(method: str, settings: QuantizeSettings) -> Quantizer | None:
    """Answer for bnb-nf4 and bnb-int8."""
    if method not in ("bnb-nf4", "bnb-int8"):
        return None
    from core_quant_bnb.quantizer import BnbQuantizer

    return BnbQuantizer(method, settings)
