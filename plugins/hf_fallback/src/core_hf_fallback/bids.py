"""The fallback's bids: one for each tier, or one refusal. Looks at the config only; imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from core.config import EngineConfig
from core.contracts import Bid, Checkpoint, Model, Refusal
from core.model_loader import BuildContext
from core.spec import ModelSpec
from core_hf_fallback.patches import check_names

FAMILY = "transformers"
TIERS = {"paged": 30, "rows": 20, "cache": 10}


def bids_for(spec: ModelSpec, options: EngineConfig) -> list[Bid[Model] | Refusal]:
    """Bid with every tier for whatever transformers knows, or for remote code that may run."""
    check_names(options.disable_patches)
    reason = _why_not(spec, options)
    if reason is not None:
        return [Refusal(reason)]
    return [
        Bid(
            f"{FAMILY}/{tier}",
            priority,
            _builder(tier),
            {"tier": tier, "probed": True},
            is_fallback=True,
            family=FAMILY,
        )
        for tier, priority in TIERS.items()
    ]


def _why_not(spec: ModelSpec, options: EngineConfig) -> str | None:
    remote = spec.auto_map.get("AutoModelForCausalLM")
    if remote and not options.trust_remote_code:
        return (
            f"the checkpoint brings its own Python code ({', '.join(sorted(remote_files(spec)))}); nothing of it was "
            "run. Read it, then start with --trust-remote-code"
        )
    if remote or knows(spec.model_type):
        return None
    return f"transformers knows no model type {spec.model_type!r}; a newer version may (pip install -U transformers)"


def remote_files(spec: ModelSpec) -> set[str]:
    """Return the Python files that the config's auto_map points to."""
    targets = [target for entry in spec.auto_map.values() for target in (entry if isinstance(entry, list) else [entry])]
    return {f"{str(target).split('--')[-1].split('.')[0]}.py" for target in targets if target}


def knows(model_type: str) -> bool:
    """True if transformers has this model type. Importing it takes a second, so its folders are asked first."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        return False
    if (Path(found.origin).parent / "models" / model_type.replace("-", "_")).is_dir():
        return True
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _builder(tier: str) -> Callable[[Checkpoint, BuildContext], Model | Refusal]:
    def build(checkpoint: Checkpoint, context: BuildContext) -> Model | Refusal:
        from core_hf_fallback.build import build_tier

        return build_tier(tier, checkpoint, context)

    return build
