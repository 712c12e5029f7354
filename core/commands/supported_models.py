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
    help="Results as JSON lines: what it holds is not checked again, what is found is appended.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the table here. Default: print it.",
)
@click.option("--time-limit", type=float, default=180.0, show_default=True, metavar="SECONDS", help="For each step.")
def supported_models(only: str, jobs: int, results: Path | None, output: Path | None, time_limit: float) -> int:
    """Build a tiny random model of every causal architecture of transformers, serve it, compare with `generate`.

    Prints or writes a Markdown table: who serves it, and whether its tokens are right. Ends with exit code 1 if one
    is wrong or crashes. All of them take about a quarter of an hour.
    """
    import transformers

    from core.supported_models import choose, markdown, short, survey

    models = choose([name.strip() for name in only.split(",") if name.strip()])
    found = survey(models, jobs, results, lambda each: click.echo(short(each), err=True), time_limit)
    page = markdown(found, transformers.__version__)
    if output is None:
        click.echo(page, nl=False)
    else:
        output.write_text(page)
    bad = [each for each in found for served in (each.auto, each.fallback) if served and served.verdict in BAD]
    return 1 if bad else 0


BAD = ("wrong", "crashed")
