"""Plots of `core-serve bench` reports. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.bench.latency import Latency, LatencyReport
from core.bench.numbers import Line
from core.bench.report import Report
from core.bench.scaling import ScalingReport
from core.bench.serve import ServeReport
from core.bench.throughput import ThroughputReport
from core.errors import ConfigError


def check_matplotlib() -> None:
    """Raise ConfigError, naming the extra, if it is not installed: before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib. Install it: pip install 'core-serve[plot]'") from None


def plot(report: Report, file: Path) -> None:
    """Draw a report into a picture file, whose kind its name says (.png, .svg, .pdf)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    if isinstance(report, LatencyReport):
        _latency(report, left, right)
    elif isinstance(report, ScalingReport):
        _scaling(report, left, right)
    elif isinstance(report, ThroughputReport):
        _throughput(report, left, right)
    else:
        _serve(report, left, right)
    figure.savefig(file)


def _throughput(report: ThroughputReport, left: Any, right: Any) -> None:
    counts = [row.concurrency for row in report.rows]
    decode = [row.decode_tok_s for row in report.rows]
    left.plot(counts, decode, "o-", label="decode")
    left.plot(counts, [row.output_tok_s for row in report.rows], "o-", label="output, prefill included")
    left.plot(counts, [row.decode_tok_s / row.decode_share for row in report.rows], ":", label="decode, bound")
    left.set(xlabel="requests at a time", ylabel="tokens/s", xscale="log", yscale="log")
    left.set_xticks(counts, [str(count) for count in counts])
    left.legend()
    right.plot(counts, [row.itl_p50_s * 1e3 for row in report.rows], "o-", label="median")
    right.plot(counts, [row.itl_p99_s * 1e3 for row in report.rows], "o-", label="99th percentile")
    right.set(xlabel="requests at a time", ylabel="between two tokens, ms", ylim=(0, None))
    right.legend()


def _latency(report: LatencyReport, left: Any, right: Any) -> None:
    _steps(left, [row.context for row in report.by_context], report.by_context, report.context_line)
    left.set(xlabel="context of one request, tokens", title="one request")
    _steps(right, [row.batch for row in report.by_batch], report.by_batch, report.batch_line)
    right.set(xlabel="requests", title=f"context {report.sweep.contexts[0]}")


def _steps(axes: Any, xs: Sequence[int], rows: Sequence[Latency], line: Line | None) -> None:
    axes.plot(xs, [row.step_s * 1e3 for row in rows], "o", label="step, median")
    axes.plot(xs, [row.bound_s * 1e3 for row in rows], ":", color="gray", label="bound")
    if line is not None:
        axes.plot(
            xs, [line.at(x) * 1e3 for x in xs], "-", label=f"{line.intercept * 1e3:.2f} + {line.slope * 1e3:.4f} x"
        )
    axes.set(ylabel="ms a step", ylim=(0, None))
    axes.legend()


def _scaling(report: ScalingReport, left: Any, right: Any) -> None:
    for count in report.load.concurrency:
        rows = [row for row in report.rows if row.concurrency == count]
        millions = [row.parameters / 1e6 for row in rows]
        line = report.line(count)
        slope = "" if line is None else f", slope {line.slope:.2f}"
        left.plot(millions, [row.decode_tok_s for row in rows], "o-", label=f"{count} at a time{slope}")
        right.plot(millions, [row.decode_share for row in rows], "o-", label=f"decode, {count} at a time")
        right.plot(millions, [row.prefill_share for row in rows], "x--", label=f"prefill, {count} at a time")
    left.set(xlabel="weights, millions", ylabel="decoded tokens/s", xscale="log", yscale="log")
    right.set(xlabel="weights, millions", ylabel="share of the roofline", xscale="log", ylim=(0, None))
    left.legend()
    right.legend()


def _serve(report: ServeReport, left: Any, right: Any) -> None:
    counts = [row.clients for row in report.rows]
    left.plot(counts, [row.output_tok_s for row in report.rows], "o-", label="over HTTP")
    left.plot(counts, [row.offline_tok_s for row in report.rows], "o:", label="offline engine")
    left.set(xlabel="clients", ylabel="tokens/s", ylim=(0, None))
    left.legend()
    right.plot(counts, [row.itl_p50_s * 1e3 for row in report.rows], "o-", label="between tokens, median")
    right.plot(counts, [row.itl_p99_s * 1e3 for row in report.rows], "o-", label="between tokens, 99th percentile")
    right.plot(counts, [row.ttft_p50_s * 1e3 for row in report.rows], "o-", label="to the first token, median")
    right.set(xlabel="clients", ylabel="ms", ylim=(0, None))
    right.legend()
