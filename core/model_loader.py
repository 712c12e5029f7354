"""BuildContext: what the host hands to the builder of a model; and the walk down the ranked bids until one builds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.contracts import AttentionBackend, Bid, Checkpoint, Model, QuantMethod, Refusal
from core.errors import NoImplementation
from core.kernel_contracts import Kernels

if TYPE_CHECKING:
    import torch

    from core.config import EngineConfig

logger = logging.getLogger("core_serve.model")


class Stopwatch:
    """Adds up what the seconds of building a model go to; a measurement inside of another one counts alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = 0.0
        self._running: list[str] = []

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Count the time inside as spent on `what`."""
        self._turn()
        self._running.append(what)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def _turn(self) -> None:
        now = time.monotonic()
        if self._running:
            self.seconds[self._running[-1]] = self.seconds.get(self._running[-1], 0.0) + now - self._since
        self._since = now

    def __str__(self) -> str:
        return ", ".join(f"{what} {seconds:.2f} s" for what, seconds in self.seconds.items())


@dataclass(frozen=True)
class BuildContext:
    """Given to `bid.build(checkpoint, context)`."""

    options: EngineConfig
    device: torch.device
    dtype: torch.dtype
    make_attention: Callable[[], AttentionBackend]  # a new backend of the chosen kind, for probes
    quant_method: QuantMethod | None = None
    kernels: Kernels | None = None  # for the device; None: everything is computed with torch
    shared: dict[str, Any] = field(default_factory=dict)  # between bids of one plugin: a module loaded once
    stopwatch: Stopwatch = field(default_factory=Stopwatch)  # builders may say what their time goes to


@dataclass(frozen=True)
class BuildAttempt:
    """One bid whose build was tried."""

    name: str
    refusal: str | None  # None: it serves


def build_model(
    bids: Sequence[Bid[Model]], checkpoint: Checkpoint, context: BuildContext
) -> tuple[Model, list[BuildAttempt]]:
    """Build the first of the ranked bids that does not refuse. Raises NoImplementation with every reason."""
    attempts: list[BuildAttempt] = []
    for bid in bids:
        built = bid.build(checkpoint, context)
        if not isinstance(built, Refusal):
            attempts.append(BuildAttempt(bid.name, None))
            return built, attempts
        logger.warning("%s declined after loading: %s", bid.name, built.reason)
        attempts.append(BuildAttempt(bid.name, built.reason))
    reasons = "; ".join(f"{attempt.name}: {attempt.refusal}" for attempt in attempts)
    raise NoImplementation(f"No implementation could serve {checkpoint.spec.path}. {reasons}")
