"""`core-serve quantize`: make a quantized checkpoint out of a float model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from core.config import DTYPES
from core.plugins import PluginHost

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("quantize", short_help="Make a quantized checkpoint of a model.")
@click.argument("model")
@click.option("--method", required=True, help="awq, gptq, bnb-nf4, bnb-int8, int4, int8, or another plugin's.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True, metavar="DIR")
@click.option("--group-size", type=int, help="Weights that share a scale; -1 = a whole row. Default: the largest fit.")
@click.option("--symmetric/--asymmetric", default=None, help="Without or with zero points. Default: the method's.")
@click.option("--desc-act/--no-desc-act", default=None, help="GPTQ: columns in the order of their importance.")
@click.option("--text", type=FILE, metavar="FILE", help="Calibrate on this text. Default: a shipped one.")
@click.option("--samples", type=click.IntRange(1), default=64, show_default=True, help="Samples of it at the most.")
@click.option("--sample-length", type=click.IntRange(1), default=512, show_default=True, help="Tokens of a sample.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Of what stays in floats.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 ...")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings.")
@click.pass_obj
def quantize(host: PluginHost, /, **given: Any) -> None:
    """Quantize the float model MODEL, a decoder layer at a time, and write a checkpoint that transformers and
    core-serve load. A run that was cut off goes on where it stopped when the same command is given again.
    """
    from rich.console import Console
    from rich.progress import Progress

    from core.contracts import QuantizeSettings
    from core.quantize.run import QuantizeJob, QuantizeReport
    from core.quantize.run import quantize as make

    settings = QuantizeSettings(*[given.pop(name) for name in ("group_size", "symmetric", "desc_act")])
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{given['method']}: layers", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        report: QuantizeReport = make(QuantizeJob(settings=settings, **given), host, show)
    click.echo(describe(report))


def describe(report: Any) -> str:
    """Return what a person reads at the end."""
    share = report.bytes / report.source_bytes
    groups = "" if report.group_size is None else f", group size {report.group_size}"
    lines = [f"{report.output}: {report.bytes:,} bytes, {share:.0%} of the float weights"]
    lines.append(f"quantized: {report.quantized} linears{groups}")
    if report.in_floats:
        few = ", ".join(report.in_floats[:5])
        more = f" and {len(report.in_floats) - 5} more" if len(report.in_floats) > 5 else ""
        lines.append(f"in floats: {few}{more}")
    return "\n".join(lines)
