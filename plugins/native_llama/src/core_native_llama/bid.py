"""Whether this plugin takes a checkpoint, by its config alone. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.contracts import Bid, Checkpoint, Model, Refusal
from core.spec import ModelSpec
from core_native_llama.config import FAMILY, LlamaConfig, NotSupported

if TYPE_CHECKING:
    from core.model_loader import BuildContext

NAME = "native_llama"
PRIORITY = 100


def bid_for(spec: ModelSpec) -> Bid[Model] | Refusal | None:
    """Bid for the family, refuse what only looks like it, pass on everything else."""
    if spec.model_type not in FAMILY:
        return None
    try:
        config = LlamaConfig.from_spec(spec)
    except NotSupported as reason:
        return Refusal(str(reason))

    def build(checkpoint: Checkpoint, context: BuildContext) -> Model | Refusal:
        from core_native_llama.load import load

        return load(config, checkpoint, context)

    features = {
        "rope": config.rope.get("rope_type", "default"),
        "windows": any(config.windows),
        "qk_norm": config.qk_norm,
    }
    return Bid(NAME, PRIORITY, build, features)
