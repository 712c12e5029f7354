"""The command `core-serve`: plugins are loaded first, so that they can add subcommands; then the line is parsed.

Importing this file imports neither torch nor transformers nor fastapi.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click
from click.core import ParameterSource

import core
from core.commands.bench import bench
from core.commands.chat import chat
from core.commands.eval_quant import eval_quant
from core.commands.explain import explain
from core.commands.generate import generate
from core.commands.kernels import kernels
from core.commands.options import engine_options
from core.commands.plugins import plugins
from core.commands.quantize import quantize
from core.commands.serve import serve, server_options
from core.commands.supported_models import supported_models
from core.commands.verify import verify
from core.errors import CoreError
from core.plugins import PluginHost

PROG = "core-serve"
COMMANDS: tuple[click.Command, ...] = (
    plugins,
    explain,
    generate,
    chat,
    verify,
    quantize,
    eval_quant,
    supported_models,
    kernels,
    bench,
)


def main() -> None:
    """Run the command line of this process."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code. The one place where a CoreError becomes a line on stderr."""
    try:
        host = PluginHost.load(disable=disabled_in(argv))
        cli = make_cli()
        host.register_commands(cli)
        outcome = cli.main(args=list(argv), prog_name=PROG, standalone_mode=False, obj=host)
        return outcome if isinstance(outcome, int) else 0
    except CoreError as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        click.echo(f"{PROG}: error: {error}{notes}", err=True)
        return 1
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130  # what a shell reports for Ctrl-C


def disabled_in(argv: Sequence[str]) -> tuple[str, ...]:
    """Return what --disable-plugin names: needed before the line can be parsed, since plugins add commands."""
    names: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--":
            break
        if argument == "--disable-plugin":
            names += [name for name in [next(arguments, None)] if name is not None]
        elif argument.startswith("--disable-plugin="):
            names.append(argument.partition("=")[2])
    return tuple(names)


def make_cli() -> click.Group:
    """Return the command line with the core's own commands; a new one each time, since plugins add to it."""

    @click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
    @engine_options
    @server_options
    @click.version_option(core.__version__, prog_name=PROG)
    @click.pass_context
    def cli(ctx: click.Context, /, **given: Any) -> int | None:
        """Serve a language model over HTTP, with OpenAI's API. With a COMMAND, do that instead.

        Without --model-path the demo model is served. `core-serve explain PATH` says who would serve a model.
        """
        if ctx.invoked_subcommand is None:
            return serve(given, ctx.obj)
        _refuse_misplaced(ctx, ctx.invoked_subcommand)
        return None

    for command in COMMANDS:
        cli.add_command(command)
    return cli


def _refuse_misplaced(ctx: click.Context, command: str) -> None:
    """Options before a command are the server's; they would change nothing, and nobody would be told."""
    for parameter in ctx.command.params:
        given = ctx.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name != "disable_plugins":
            raise click.UsageError(f"{parameter.opts[0]} stands before the command {command!r}; write it after.", ctx)
