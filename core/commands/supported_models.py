"""`core-serve supported-models`: every causal language model of transformers, built small, served and compared."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("supported-models", short_help="Check which models of transformers are served right.")
@click.option(
    "--only", metavar="A,B", default="", help="Model types. Default: all that transformers can generate with."
)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Model types checked at a time.")
@click.option(
    "--resume",
    "results",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Results as JSON lines: what it holds of this very code is not checked again, what is found is appended.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the table here. Default: print it.",
)
@click.option(
    "--check",
    "committed",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Compare with this table; print each difference and end with exit code 1 if there is one.",
)
@click.option("--time-limit", type=float, default=180.0, show_default=True, metavar="SECONDS", help="For each step.")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="That serves; references run on a CPU.",
)
def supported_models(
    only: str,
    jobs: int,
    results: Path | None,
    output: Path | None,
    committed: Path | None,
    time_limit: float,
    device: str,
) -> int:
    """Build a tiny random model of every causal architecture of transformers, serve it, compare with `generate`.

    Prints or writes a Markdown table: who serves it, and whether its tokens are right. Ends with exit code 1 if one is
    wrong or crashes. All of them take about a quarter of an hour.
    """
    import transformers

    from core.engine_build import choose_device
    from core.supported_models import Survey, choose, survey
    from core.supported_page import differences, markdown, short

    chosen = [name.strip() for name in only.split(",") if name.strip()]
    how = Survey(jobs, results, time_limit, choose_device(device))
    found = survey(choose(chosen), how, lambda each: click.echo(short(each), err=True))
    page = markdown(found, transformers.__version__)
    if output is not None:
        output.write_text(page)
    elif committed is None:
        click.echo(page, nl=False)
    bad = any(one.verdict in BAD for each in found for one in (each.auto, each.fallback) if one)
    unequal = differences(committed.read_text(), page, rows_only=bool(chosen)) if committed else []
    for line in unequal:
        click.echo(line)
    if committed is not None:
        click.echo(_summary(len(found), len(unequal), committed))
    return 1 if bad or unequal else 0


def _summary(count: int, unequal: int, committed: Path) -> str:
    if not unequal:
        return f"{committed} is what a run over {count} model types finds."
    return f"{committed} differs in {unequal} places from a run over {count} model types; write it anew with --output."


BAD = ("wrong", "crashed")
