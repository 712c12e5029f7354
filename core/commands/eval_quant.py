"""`core-serve eval-quant`: what quantizing a model cost, in perplexity and KL, and what it gained in size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from core.commands.options import model_options
from core.plugins import PluginHost

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("eval-quant", short_help="Compare a quantized model with the float one.")
@click.argument("model")
@click.argument("quantized", required=False)
@click.option("--text", type=FILE, metavar="FILE", help="Measure on this text. Default: a shipped one's second half.")
@click.option("--samples", type=click.IntRange(1), help="Samples of the text at the most. Default: all.")
@click.option("--sample-length", type=click.IntRange(2), default=512, show_default=True, help="Tokens of a sample.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Draw (.png, .svg, .pdf)."
)
@model_options
@click.pass_obj
def eval_quant(
    host: PluginHost, /, model: str, quantized: str | None, as_json: bool, plot: Path | None, **given: Any
) -> None:
    """Compare the float MODEL with QUANTIZED, both as they are served: perplexity, KL, top-1 agreement, sizes.

    Without QUANTIZED, MODEL is compared with itself under --quantization on the fly.
    """
    if (quantized is None) == (given.get("quantization") is None):
        raise click.UsageError("Give either QUANTIZED or --quantization.")
    from core.eval_quant import eval_quant as compare
    from core.eval_quant_report import plot as draw
    from core.eval_quant_report import report_json, report_text

    set_ones = {name: value for name, value in given.items() if value is not None}
    set_ones["disable_plugins"] = host.disabled
    report = compare(model, quantized, host=host, progress=_show, **set_ones)
    if plot is not None:
        draw(report, plot)
    click.echo(json.dumps(report_json(report), indent=2) if as_json else report_text(report), nl=as_json)


def _show(done: int, total: int) -> None:
    click.echo(f"\rsample {done} of {total}" + ("\n" if done == total else ""), nl=False, err=True)
