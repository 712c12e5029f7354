"""Checkpoints in 8 bit floats: quant_method "fp8" (block scales, DeepSeek's way) and "fbgemm_fp8" (a scale a row)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.hookspecs import hookimpl

if TYPE_CHECKING:
    from core.config import EngineConfig
    from core.contracts import QuantMethod
    from core.spec import ModelSpec

CORE_API = (1, 0)


@hookimpl
def provide_quant_method(spec: ModelSpec, options: EngineConfig) -> QuantMethod | None:
    stated = (spec.quantization_config or {}).get("quant_method")
    if stated not in ("fp8", "fbgemm_fp8") or options.quantization not in (None, stated):
        return None
    from core_quant_fp8.method import FP8Method

    return FP8Method(spec)
