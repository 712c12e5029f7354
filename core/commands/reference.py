"""The help texts of the core's own commands as Markdown, for docs/cli.md."""

from __future__ import annotations

import click

WIDTH = 100  # columns; fixed, so that the page is the same on every terminal


def reference() -> str:
    """Return one section a command, `core-serve` itself first."""
    from core.cli import PROG, make_cli

    cli = make_cli()
    commands: dict[str, click.Command] = {PROG: cli}
    for name, command in sorted(cli.commands.items()):
        commands[f"{PROG} {name}"] = command
        if isinstance(command, click.Group):
            commands |= {f"{PROG} {name} {below}": part for below, part in sorted(command.commands.items())}
    return "\n" + "\n".join(_section(name, command) for name, command in commands.items()) + "\n"


def _section(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name, terminal_width=WIDTH, help_option_names=["-h", "--help"])
    return f"## {name}\n\n```text\n{command.get_help(context)}\n```\n"
