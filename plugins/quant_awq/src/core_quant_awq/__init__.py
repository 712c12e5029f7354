"""AWQ checkpoints: those of AutoAWQ and llm-awq, and auto-round's in AWQ's packing. Needs neither of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.hookspecs import hookimpl

if TYPE_CHECKING:
    from core.config import EngineConfig
    from core.contracts import Quantizer, QuantizeSettings, QuantMethod
    from core.spec import ModelSpec

CORE_API = (1, 0)


@hookimpl
def provide_quant_method(spec: ModelSpec, options: EngineConfig) -> QuantMethod | None:
    from core_quant_awq.settings import AwqSettings, is_awq

    stated = spec.quantization_config
    if stated is None or not is_awq(stated) or options.quantization not in (None, "awq", stated.get("quant_method")):
        return None
    settings = AwqSettings.of(stated, str(spec.path))
    from core_quant_awq.method import AwqMethod

    return AwqMethod(settings)


@hookimpl
def provide_quantizer(method: str, settings: QuantizeSettings) -> Quantizer | None:
    if method != "awq":
        return None
    from core_quant_awq.quantizer import AwqQuantizer

    return AwqQuantizer(settings)
