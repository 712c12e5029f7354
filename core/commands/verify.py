"""`core-serve verify`: a served model beside plain transformers, layer by layer. Exit code 1 where they depart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from core.commands.options import model_options
from core.plugins import PluginHost


@click.command("verify", short_help="Compare a served model with plain transformers.")
@click.argument("model", required=False)
@click.option("--against", type=click.Choice(["transformers"]), default="transformers", show_default=True)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Compare on parts of this text. Default: random tokens.",
)
@click.option(
    "--tolerance",
    type=float,
    help="In standard deviations. Default: 0.001 in float32, 0.25 in half types.",
)
@click.option("--time-limit", type=float, default=300.0, show_default=True, help="Seconds; longer texts are left out.")
@click.option("--layers/--no-layers", default=True, help="Compare the hidden states after every layer.")
@click.option("--context-length", "--max-model-len", "max_model_len", type=int, help="Tokens. Default: the model's.")
@click.option("--page-size", "--block-size", "block_size", type=int, help="Tokens in a KV block.")
@click.option(
    "--chunked-prefill-size",
    "--max-num-batched-tokens",
    "max_num_batched_tokens",
    type=int,
    help="Token budget of a step. Default: four blocks and three, so that prompts are cut.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@model_options
@click.pass_obj
def verify(host: PluginHost, /, model: str | None, text: Path | None, as_json: bool, **given: Any) -> int:
    """Compare MODEL, as it would be served, with plain transformers; exit with 1 where they depart.

    MODEL is a folder, a file or the name of a model in the local cache; the demo model if it is left out.
    """
    from core.verify import verify as compare
    from core.verify_report import report_json, report_text

    set_ones = {name: value for name, value in given.items() if value is not None}
    set_ones["disable_plugins"] = host.disabled
    report = compare(model, text=text.read_text() if text else None, host=host, **set_ones)
    click.echo(json.dumps(report_json(report), indent=2) if as_json else report_text(report), nl=as_json)
    return 0 if report.passed else 1
