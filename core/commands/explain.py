"""`core-serve explain`: who would serve a model, and why the others would not.

Reads the config, no weights; with --probe the model is built, as it would be to serve it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from core.choice import explain_json, explain_text
from core.commands.options import make_config, model_options
from core.demo import demo_model_path
from core.plugins import PluginHost
from core.spec import ModelSpec

if TYPE_CHECKING:
    from core.config import EngineConfig
    from core.probe import ProbedBid


@click.command("explain", short_help="Show who would serve a model, and why.")
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--probe", is_flag=True, help="Load the model too, and show what every attempt to build it said.")
@model_options
@click.pass_obj
def explain(host: PluginHost, /, as_json: bool, probe: bool, **given: Any) -> int:
    """Show who would serve MODEL and with which attention, who else bid, and why the others declined.

    MODEL is a folder, a file or the name of a model in the local cache; the demo model if it is left out.
    """
    options = make_config(given, host)
    spec = host.open_checkpoint(options.model or demo_model_path(), options).spec
    method = host.quant_method(spec, options)
    quantization = None if method is None else method.name
    model = host.choose_model(spec, options)
    attention = host.choose_attention(spec, options)
    if as_json:
        report = {**_facts(spec), "quantization": quantization}
        report |= {"model_impl": explain_json(model), "attention_backend": explain_json(attention)}
        probed = _probe(options, host) if probe else []
        report |= {"probe": [asdict(one) for one in probed]} if probe else {}
        click.echo(json.dumps(report, indent=2))
        return _exit_code(probe, probed)
    for name, value in {**_facts(spec), "quantization": quantization}.items():
        click.echo(f"{name.replace('_', ' ')}: {value if value is not None else '-'}")
    click.echo("\n" + explain_text(model) + "\n" + explain_text(attention), nl=False)
    probed = _probe(options, host) if probe else []
    for one in probed:
        outcome = "serves" if one.refusal is None else f"declined: {one.refusal}"
        patches = f"; patches: {', '.join(one.patches)}" if one.patches else ""
        parts = "".join(f", {what} {seconds:.1f}" for what, seconds in one.parts.items())
        click.echo(f"{one.name}: {outcome}{patches} ({one.seconds:.1f} s{parts})")
    return _exit_code(probe, probed)


def _probe(options: EngineConfig, host: PluginHost) -> list[ProbedBid]:
    from core.probe import probe_model  # imports torch

    return probe_model(options, host)


def _exit_code(probe: bool, probed: Sequence[ProbedBid]) -> int:
    """1 if nobody serves after all."""
    return int(probe and all(one.refusal is not None for one in probed))


def _facts(spec: ModelSpec) -> dict[str, Any]:
    return {
        "model": str(spec.path),
        "format": spec.format,
        "model_type": spec.model_type,
        "architecture": spec.architecture,
        "dtype": spec.torch_dtype,
        "max_positions": spec.max_positions,
    }
