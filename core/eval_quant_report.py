"""An EvalQuantReport as text, as JSON and as a plot. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError
from core.plugin_report import render

if TYPE_CHECKING:
    from core.eval_quant import EvalQuantReport


def report_json(report: EvalQuantReport) -> dict[str, Any]:
    """Return the report as JSON knows it, without the figures of single positions."""
    found = asdict(report) | {"perplexity_ratio": report.perplexity_ratio}
    del found["kl"]
    return found


def report_text(report: EvalQuantReport, width: int = 120) -> str:
    """Return what a person reads."""
    from rich.table import Table

    floats, quantized = report.floats, report.quantized
    table = Table("", "floats", "quantized", "ratio")
    table.add_row(
        "served by", floats.impl_name, f"{quantized.impl_name} ({quantized.quantization or 'not quantized'})", ""
    )
    table.add_row(
        "perplexity", f"{floats.perplexity:.3f}", f"{quantized.perplexity:.3f}", f"{report.perplexity_ratio:.4f}"
    )
    for name, one, other in (
        ("on disk, MB", floats.disk_bytes, quantized.disk_bytes),
        ("in memory, MB", floats.memory_bytes, quantized.memory_bytes),
    ):
        table.add_row(name, f"{one / 1e6:.1f}", f"{other / 1e6:.1f}", f"{other / max(one, 1):.3f}")
    numbers = Table("floats against quantized", "value")
    numbers.add_row("positions", str(report.tokens))
    numbers.add_row("KL, mean", f"{report.kl_mean:.2e} nats")
    numbers.add_row("KL, median", f"{report.kl_median:.2e} nats")
    numbers.add_row("KL, 99th percentile", f"{report.kl_p99:.2e} nats")
    numbers.add_row("top-1 agreement", f"{report.top1_agreement:.2%}")
    head = f"floats: {floats.path}\nquantized: {quantized.path}\n"
    return f"{head}{render(table, width)}{render(numbers, width)}({report.seconds:.0f} s)\n"


def plot(report: EvalQuantReport, file: Path) -> None:
    """Draw how KL is spread over positions, and what became smaller. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib. Install it: pip install 'core-serve[plot]'") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    spread, sizes = figure.subplots(1, 2, width_ratios=(2, 1))
    ranked = sorted(report.kl)
    spread.plot([(index + 1) / len(ranked) for index in range(len(ranked))], [max(value, 1e-9) for value in ranked])
    spread.set(yscale="log", xlabel="share of positions", ylabel="KL(floats || quantized) at most, nats")
    spread.set_title(f"mean {report.kl_mean:.2e} nats · top-1 agreement {report.top1_agreement:.1%}")
    pairs = {
        "perplexity": report.perplexity_ratio,
        "disk": report.quantized.disk_bytes / max(report.floats.disk_bytes, 1),
        "memory": report.quantized.memory_bytes / max(report.floats.memory_bytes, 1),
    }
    bars = sizes.bar(list(pairs), list(pairs.values()))
    sizes.bar_label(bars, fmt="%.3f")
    sizes.axhline(1.0, linestyle=":", color="gray")
    sizes.set_title("quantized / floats")
    figure.savefig(file)
