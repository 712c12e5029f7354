"""GPTQ checkpoints: those of AutoGPTQ, gptqmodel and optimum, and auto-round's in these packings."""

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
    from core_quant_gptq.settings import GptqSettings, is_gptq

    stated = spec.quantization_config
    if stated is None or not is_gptq(stated) or options.quantization not in (None, "gptq", stated.get("quant_method")):
        return None
    settings = GptqSettings.of(stated, str(spec.path))
    from core_quant_gptq.method import GptqMethod

    return GptqMethod(settings)


@hookimpl
def provide_quantizer(method: str, settings: QuantizeSettings) -> Quantizer | None:
    if method != "gptq":
        return None
    from core_quant_gptq.quantizer import GptqQuantizer

    return GptqQuantizer(settings)
