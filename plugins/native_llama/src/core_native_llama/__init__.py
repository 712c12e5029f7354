"""The Llama family, natively: Llama 2 and 3, Mistral, Qwen2, Qwen3, SmolLM2 and whatever shares their shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.hookspecs import hookimpl

if TYPE_CHECKING:
    from core.config import EngineConfig
    from core.contracts import Bid, Model, Refusal
    from core.spec import ModelSpec

CORE_API = (1, 0)


@hookimpl
def resolve_model_impl(spec: ModelSpec, options: EngineConfig) -> Bid[Model] | Refusal | None:
    from core_native_llama.bid import bid_for

    return bid_for(spec)
