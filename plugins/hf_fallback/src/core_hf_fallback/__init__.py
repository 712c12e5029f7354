"""Any causal language model of transformers, through its own module. Three ways, the fastest right one is probed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.hookspecs import hookimpl

if TYPE_CHECKING:
    from core.config import EngineConfig
    from core.contracts import Bid, Model, QuantMethod, Refusal
    from core.spec import ModelSpec

CORE_API = (1, 0)


@hookimpl
def resolve_model_impl(spec: ModelSpec, options: EngineConfig) -> list[Bid[Model] | Refusal]:
    from core_hf_fallback.bids import bids_for

    return bids_for(spec, options)


@hookimpl
def provide_quant_method(spec: ModelSpec, options: EngineConfig) -> QuantMethod | None:
    """Claim formats that transformers reads by itself and no plugin of core-serve does."""
    if spec.quantization_config is None:
        return None
    from core_hf_fallback.passthrough import passed_through

    return passed_through(spec, options)
