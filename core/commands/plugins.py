"""`core-serve plugins`: what is installed, in the order in which it is asked."""

from __future__ import annotations

import json

import click

from core.commands.options import DISABLE_PLUGIN
from core.plugin_report import plugins_json, plugins_text
from core.plugins import PluginHost


@click.command("plugins", short_help="List the installed plugins.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@DISABLE_PLUGIN
@click.pass_obj
def plugins(host: PluginHost, /, as_json: bool, disable_plugins: tuple[str, ...]) -> None:
    """List the plugins that are installed, in the order in which they are asked."""
    if as_json:
        click.echo(json.dumps(plugins_json(host.plugins), indent=2))
    else:
        click.echo(plugins_text(host.plugins), nl=False)
