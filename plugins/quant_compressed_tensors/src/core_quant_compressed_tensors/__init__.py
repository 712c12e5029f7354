"""Checkpoints of llm-compressor: quant_method "compressed-tensors". Makes them, too: methods int4 and int8."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.hookspecs import hookimpl

if TYPE_CHECKING:
    from core.config import EngineConfig
    from core.contracts import Quantizer, QuantizeSettings, QuantMethod
    from core.spec import ModelSpec

CORE_API = (1, 0)
NAME = "compressed-tensors"


@hookimpl
def provide_quant_method(spec: ModelSpec, options: EngineConfig) -> QuantMethod | None:
    if (spec.quantization_config or {}).get("quant_method") != NAME or options.quantization not in (None, NAME):
        return None
    from core_quant_compressed_tensors.method import CompressedTensorsMethod

    return CompressedTensorsMethod(spec)


@hookimpl
def provide_quantizer(method: str, settings: QuantizeSettings) -> Quantizer | None:
    if method not in ("int4", "int8"):
        return None
    from core_quant_compressed_tensors.quantizer import IntQuantizer

    return IntQuantizer(int(method.removeprefix("int")), settings)
