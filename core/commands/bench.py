"""`core-serve bench`: how fast a model is served here, beside what the machine allows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from core.commands.options import engine_options, make_config
from core.plugins import PluginHost

if TYPE_CHECKING:
    from core.bench.report import Report

F = TypeVar("F", bound=Callable[..., Any])
POSITIVE = click.IntRange(1)
SUFFIXES = {"": 1, "k": 1000, "m": 1000**2, "b": 1000**3, "g": 1000**3}


def numbers(value: str | tuple[int, ...]) -> tuple[int, ...]:
    """Read numbers with commas between, such as 1,4,16; a letter multiplies (10M)."""
    if isinstance(value, tuple):
        return value
    try:
        found = tuple(dict.fromkeys(_number(part.strip().lower()) for part in value.split(",")))
    except (ValueError, KeyError):
        raise click.BadParameter(f"{value!r} is no list of numbers such as 1,4,16.") from None
    if min(found) < 1:
        raise click.BadParameter(f"{value!r}: every number has to be 1 or more.")
    return found


def _number(text: str) -> int:
    digits = text.rstrip("".join(SUFFIXES))
    return int(float(digits) * SUFFIXES[text[len(digits) :]])


def _numbers(name: str, default: str, help: str) -> Callable[[F], F]:
    return click.option(name, type=numbers, default=default, show_default=True, metavar="N,N,...", help=help)


def _count(name: str, default: int, help: str) -> Callable[[F], F]:
    return click.option(name, type=POSITIVE, default=default, show_default=True, help=help)


def _output_options(function: F) -> F:
    file = click.Path(dir_okay=False, path_type=Path)
    plot = click.option("--plot", type=file, metavar="FILE", help="Draw (.png, .svg, .pdf).")
    return click.option("--json", "json_file", type=file, metavar="FILE", help="Write all figures.")(plot(function))


PROFILE = click.option("--profile", is_flag=True, help="Show which part of a step takes how long.")
TEXT = click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Take prompts from this text. Default: random tokens.",
)


@click.group("bench", short_help="Measure speed, beside what the machine allows.")
def bench() -> None:
    """Measure how fast a model is served here, beside what the machine allows.

    Every report has the machine's ceilings (arithmetic, reading memory), measured in the same run, and the share of
    them that was reached.
    """


@bench.command("throughput", short_help="Tokens a second by the number of requests at a time.")
@_numbers("--concurrency", "1,4,16", "Requests at a time.")
@_count("--input-len", 128, "Tokens of a prompt.")
@_count("--output-len", 64, "Tokens of an answer.")
@_count("--rounds", 3, "Rounds; medians are shown.")
@TEXT
@PROFILE
@_output_options
@engine_options
@click.pass_obj
def throughput(
    host: PluginHost,
    /,
    concurrency: tuple[int, ...],
    input_len: int,
    output_len: int,
    rounds: int,
    text: Path | None,
    profile: bool,
    json_file: Path | None,
    plot: Path | None,
    **given: Any,
) -> None:
    """Answer prompts of one length with the engine in this process, no two of them alike, some at a time."""
    config = make_config(given, host)
    _check_plot(plot)
    from core.bench.subject import opened
    from core.bench.throughput import Load, measure_throughput
    from core.engine_build import offline

    with opened(offline(config), host, max(concurrency), text) as opened_bench:
        load = Load(concurrency, input_len, output_len, rounds)
        report = measure_throughput(opened_bench, load, profile, _say)
    _show(report, json_file, plot)


@bench.command("latency", short_help="The time of a step by context and by batch.")
@_numbers("--contexts", "128,256,512,1024,2048,4096,8192", "Tokens of context, with one request.")
@_numbers("--batches", "1,2,4,8,16,32,64", "Requests, with the first context.")
@_count("--steps", 16, "Timed steps of each; medians are shown.")
@TEXT
@PROFILE
@_output_options
@engine_options
@click.pass_obj
def latency(
    host: PluginHost,
    /,
    contexts: tuple[int, ...],
    batches: tuple[int, ...],
    steps: int,
    text: Path | None,
    profile: bool,
    json_file: Path | None,
    plot: Path | None,
    **given: Any,
) -> None:
    """Time steps in which every request gets one token, and fit straight lines through them."""
    config = make_config(given, host)
    _check_plot(plot)
    from core.bench.latency import Sweep, measure_latency
    from core.bench.subject import opened
    from core.engine_build import offline

    with opened(offline(config), host, max(batches), text) as opened_bench:
        report = measure_latency(opened_bench, Sweep(contexts, batches, steps), profile, _say)
    _show(report, json_file, plot)


@bench.command("scaling", short_help="Tokens a second by the size of the model.")
@_numbers("--sizes", "10M,30M,100M,300M", "Weights of the models.")
@_numbers("--concurrency", "1,16", "Requests at a time.")
@_count("--input-len", 64, "Tokens of a prompt.")
@_count("--output-len", 16, "Tokens of an answer.")
@_count("--rounds", 1, "Rounds; medians are shown.")
@_output_options
@engine_options
@click.pass_obj
def scaling(
    host: PluginHost,
    /,
    sizes: tuple[int, ...],
    concurrency: tuple[int, ...],
    input_len: int,
    output_len: int,
    rounds: int,
    json_file: Path | None,
    plot: Path | None,
    **given: Any,
) -> None:
    """Measure random Llamas of growing size, made in the folder for temporary files (4 bytes a weight)."""
    if given["model"] is not None:
        raise click.UsageError("bench scaling makes its models itself; leave out --model-path.")
    config = make_config(given, host)
    _check_plot(plot)
    from core.bench.scaling import measure_scaling
    from core.bench.throughput import Load

    report = measure_scaling(config, host, sizes, Load(concurrency, input_len, output_len, rounds), _say)
    _show(report, json_file, plot)


@bench.command("serve", short_help="What clients see of a server.")
@_numbers("--clients", "1,4,16", "Clients at a time.")
@_count("--per-client", 4, "Requests of each client, one after the other.")
@click.option("--request-rate", type=click.FloatRange(0, min_open=True), help="Requests a second, at random times.")
@_count("--input-len", 128, "Tokens of a prompt.")
@_count("--output-len", 64, "Tokens of an answer.")
@_count("--rounds", 1, "Rounds; medians are shown.")
@click.option("--url", metavar="URL", help="A server that runs already. Default: one is started for the model.")
@click.option("--api-key", metavar="KEY", envvar="CORE_API_KEY", show_envvar=True, help="The key for --url.")
@_output_options
@engine_options
@click.pass_obj
def serve(
    host: PluginHost,
    /,
    clients: tuple[int, ...],
    per_client: int,
    request_rate: float | None,
    input_len: int,
    output_len: int,
    rounds: int,
    url: str | None,
    api_key: str | None,
    json_file: Path | None,
    plot: Path | None,
    **given: Any,
) -> None:
    """Stream completions over HTTP with the openai client, and compare with the engine without HTTP.

    With --url and --model-path, the model has to be the one that the server serves.
    """
    config = make_config(given, host)
    _check_plot(plot)
    from core.bench.serve import ServeLoad, Server, measure_serve

    load = ServeLoad(clients, per_client, request_rate, input_len, output_len, rounds)
    server = None if url is None else Server(url.rstrip("/").removesuffix("/v1"), api_key, given["model"] is not None)
    _show(measure_serve(config, host, load, server, _say), json_file, plot)


def _say(what: str) -> None:
    click.echo(what, err=True)


def _check_plot(plot: Path | None) -> None:
    if plot is not None:
        from core.bench.plots import check_matplotlib

        check_matplotlib()


def _show(report: Report, json_file: Path | None, plot: Path | None) -> None:
    from core.bench.report import report_json, report_text

    click.echo(report_text(report), nl=False)
    if json_file is not None:
        json_file.write_text(json.dumps(report_json(report), indent=1) + "\n")
    if plot is not None:
        from core.bench.plots import plot as draw

        draw(report, plot)
