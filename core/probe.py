"""What each bid says when it is really built: `core-serve explain --probe`. Loads the weights, makes no engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from core.config import EngineConfig
from core.contracts import Bid, Checkpoint, Model, Refusal
from core.engine_build import make_plan
from core.errors import NoImplementation
from core.model_loader import BuildContext, build_model
from core.plugins import PluginHost


@dataclass(frozen=True)
class ProbedBid:
    """One bid whose build was tried."""

    name: str
    refusal: str | None  # None: it serves
    patches: tuple[str, ...]
    seconds: float  # the first of a plugin's bids may load what the others share
    parts: dict[str, float]  # what of that went to what, as far as the builder says


def probe_model(config: EngineConfig, host: PluginHost) -> list[ProbedBid]:
    """Walk down the eligible bids as the engine does, until one builds; if none does, the last one declined too."""
    plan = make_plan(config, host)
    found: list[ProbedBid] = []
    bids = [replace(bid, build=_noting(bid, found)) for bid in plan.models.eligible]
    try:
        build_model(bids, plan.checkpoint, plan.context)
    except NoImplementation:
        if len(found) < len(bids):  # a builder raised it, so not all were asked
            raise
    return found


def _noting(bid: Bid[Model], found: list[ProbedBid]) -> Callable[[Checkpoint, BuildContext], Model | Refusal]:
    def build(checkpoint: Checkpoint, context: BuildContext) -> Model | Refusal:
        start = time.monotonic()
        context.stopwatch.seconds.clear()
        built = bid.build(checkpoint, context)
        refusal = built.reason if isinstance(built, Refusal) else None
        patches = () if isinstance(built, Refusal) else built.features.patches
        found.append(ProbedBid(bid.name, refusal, patches, time.monotonic() - start, dict(context.stopwatch.seconds)))
        return built

    return build
