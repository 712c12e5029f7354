"""VerifyReport: how far a served model is from plain transformers, as values, as text and as JSON. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from core.plugin_report import render


@dataclass(frozen=True)
class LayerError:
    """The error of one decoder layer's output, where it is largest beside what is allowed there."""

    name: str  # in the plain module, e.g. "model.layers.0"
    served_name: str  # in the served one
    error: float  # in standard deviations of the plain hidden state of that token
    allowed: float  # the tolerance, or more where rounding alone moves the plain module further
    length: int  # of the text where it is
    position: int


@dataclass(frozen=True)
class LogitErrors:
    """Over all compared positions of all texts."""

    positions: int
    kl_mean: float  # KL(plain || served), in nats
    kl_max: float
    top1_agreement: float  # share of positions where both prefer the same token
    max_difference: float  # of a logit
    error: float  # the same in standard deviations of the plain logits, where it is largest beside what is allowed
    allowed: float
    length: int  # of the text where error is
    position: int


@dataclass(frozen=True)
class GreedyResult:
    """One prompt that both continued greedily."""

    prompt_length: int
    tokens: int
    equal: int  # tokens before the two answers part
    margin: float | None  # by how much plain prefers its own token there, in standard deviations; None: they never part


@dataclass(frozen=True)
class VerifyReport:
    """What `core-serve verify` found."""

    model: str
    impl_name: str
    attention_name: str
    dtype: str
    device: str
    against: str
    tolerance: float  # in standard deviations
    lengths: tuple[int, ...]  # of the texts that were compared, in tokens
    skipped: tuple[int, ...]  # of those that the time did not allow
    layers: tuple[LayerError, ...]
    layers_note: str | None  # why there are none
    logits: LogitErrors
    greedy: tuple[GreedyResult, ...]
    seconds: float

    @property
    def first_bad_layer(self) -> LayerError | None:
        """The first layer that departs; those after it depart because of it."""
        return next((layer for layer in self.layers if not layer.error <= layer.allowed), None)

    @property
    def problems(self) -> list[str]:
        """What is wrong, a sentence each."""
        found = []
        if (layer := self.first_bad_layer) is not None:
            found.append(f"{layer.name} is the first layer that departs: by {_beyond(layer)}.")
        if self.logits.positions == 0:
            found.append("No logits were compared; give more time with --time-limit.")
        elif not self.logits.error <= self.logits.allowed:
            found.append(f"The logits depart by {_beyond(self.logits)}.")
        found += [
            f"Greedily, the answer to {one.prompt_length} tokens parts at its token {one.equal}, where plain prefers "
            f"its own by {one.margin:.2g} of the spread."
            for one in self.greedy
            if one.margin is not None and not one.margin <= 2 * max(self.tolerance, self.logits.allowed)
        ]
        return found

    @property
    def passed(self) -> bool:
        return not self.problems


def _beyond(found: LayerError | LogitErrors) -> str:
    where = f"at position {found.position} of the text of {found.length} tokens"
    return f"{found.error:.2g} of the spread, where {found.allowed:.2g} is allowed, {where}"


def report_json(report: VerifyReport) -> dict[str, Any]:
    """Return the report as JSON knows it."""
    bad = report.first_bad_layer
    verdict = {"passed": report.passed, "problems": report.problems, "first_bad_layer": bad.name if bad else None}
    plain: dict[str, Any] = _finite(verdict | asdict(report))
    return plain


def _finite(value: Any) -> Any:
    """JSON has no infinity: null stands where a NaN was met."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_text(report: VerifyReport, width: int = 120) -> str:
    """Return what a person reads: who was compared, a table of layers, a table of numbers, the verdict."""
    head = f"model: {report.model}\nserved by: {report.impl_name} · attention: {report.attention_name} · "
    head += (
        f"{report.dtype} on {report.device}\nagainst: plain {report.against}, tolerance {report.tolerance:.2g} of the "
    )
    head += f"spread\ntexts of: {', '.join(map(str, report.lengths))} tokens"
    if report.skipped:
        head += f"; no time for: {', '.join(map(str, report.skipped))}"
    layers = f"Layers are not compared: {report.layers_note}.\n"
    if report.layers_note is None:
        layers = _layer_table(report, width)
    verdict = "\n".join(report.problems) or _passed_words(report)
    return f"{head}\n\n{layers}\n{_number_table(report, width)}\n{verdict} ({report.seconds:.0f} s)\n"


def _passed_words(report: VerifyReport) -> str:
    words = "The served model answers as plain transformers does"
    if not report.skipped:
        return f"{words}."
    return f"{words}; there was no time for texts of {', '.join(map(str, report.skipped))} tokens (--time-limit)."


def _layer_table(report: VerifyReport, width: int) -> str:
    from rich.table import Table

    table = Table("layer", "served as", "error / spread", "allowed", "at position", "of text", "")
    bad = report.first_bad_layer
    for layer in report.layers:
        mark = "departs first" if layer is bad else ""
        numbers = f"{layer.error:.1e}", f"{layer.allowed:.1e}", str(layer.position), str(layer.length)
        table.add_row(layer.name, layer.served_name, *numbers, mark)
    return render(table, width)


def _number_table(report: VerifyReport, width: int) -> str:
    from rich.table import Table

    logits = report.logits
    table = Table("measure", "value")
    table.add_row("positions compared", str(logits.positions))
    table.add_row("KL(plain || served), mean", f"{logits.kl_mean:.1e} nats")
    table.add_row("KL(plain || served), max", f"{logits.kl_max:.1e} nats")
    table.add_row("top-1 agreement", f"{logits.top1_agreement:.2%}")
    table.add_row("largest logit difference", f"{logits.max_difference:.1e}")
    table.add_row("worst logit error / spread", f"{logits.error:.1e}, allowed {logits.allowed:.1e}")
    for one in report.greedy:
        parts = "" if one.margin is None else f"; plain prefers its own token by {one.margin:.1e} of the spread"
        table.add_row(f"greedy after {one.prompt_length} tokens", f"{one.equal} of {one.tokens} tokens equal{parts}")
    return render(table, width)
