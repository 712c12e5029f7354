"""Reports of `core-serve bench` as text and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from core.bench.latency import Latency, LatencyReport
from core.bench.numbers import Line
from core.bench.profile import Profile
from core.bench.profile_parts import PARTS
from core.bench.scaling import ScalingReport
from core.bench.serve import ServeReport
from core.bench.subject import Subject
from core.bench.throughput import ThroughputReport
from core.plugin_report import render

Report = ThroughputReport | LatencyReport | ScalingReport | ServeReport
WIDTH = 140  # columns


def report_json(report: Report) -> dict[str, Any]:
    """Return the report as JSON knows it: NaN is null."""
    found = asdict(report) | _lines(report)
    plain: dict[str, Any] = _finite(found)
    return plain


def report_text(report: Report, width: int = WIDTH) -> str:
    """Return what a person reads: the head, the tables, where the time goes."""
    head = "" if report.subject is None else subject_text(report.subject)
    if isinstance(report, ThroughputReport):
        return head + _throughput(report, width) + profiles_text(report.profiles, width)
    if isinstance(report, LatencyReport):
        return head + _latency(report, width) + profiles_text(report.profiles, width)
    if isinstance(report, ScalingReport):
        return head + _scaling(report, width)
    return head + _serve(report, width)


def subject_text(subject: Subject) -> str:
    """The head of a report: what is served, the machine's ceilings, the model's costs."""
    ceilings, costs = subject.ceilings, subject.costs
    reads = " · ".join(f"{name} {speed:.1f}" for name, speed in ceilings.reads.items())
    served = {
        "served by": subject.impl_name,
        "attention": subject.attention,
        "quantizer": subject.quantization or "none",
        "kernels": subject.kernels or "torch",
    }
    machine = (
        f"{subject.threads} threads on {subject.cores} cores · matrix product {ceilings.gflops:.0f} GFLOP/s in "
        f"{ceilings.dtype} · reading memory {ceilings.read_gb_s:.1f} GB/s (by way: {reads})"
    )
    token = (
        f"{costs.parameters / 1e6:.1f} M weights in {costs.weight_bytes / 1e6:.1f} MB · a step of one token reads "
        f"{costs.step_bytes(1) / 1e6:.1f} MB · a token takes {costs.flops_per_token / 1e6:.1f} MFLOP and reads "
        f"{costs.kv_bytes(1000) / 1e6:.2f} MB of K/V at a context of 1,000"
    )
    lines = [
        f"model: {subject.model}",
        " · ".join(f"{name}: {value}" for name, value in served.items()),
        f"{subject.dtype} on {subject.device} · torch {subject.torch_version}",
        f"machine: {machine}",
        f"costs: {token}",
    ]
    if not subject.is_quiet:
        lines.append(f"NOT QUIET: the load average was {subject.load_average:.1f} before the first measurement.")
    return "\n".join(lines) + "\n\n"


# ------------------------------------------------------------------------------------------------ tables


def _throughput(report: ThroughputReport, width: int) -> str:
    load = report.load
    title = f"{load.input_len} tokens in, {load.output_len} out, medians of {load.rounds} rounds"
    columns = ("at once", "output tok/s", "decode tok/s", "of bound", "prefill tok/s", "of bound", "TTFT ms", "p99")
    rows = [
        (
            str(row.concurrency), _one(row.output_tok_s), _one(row.decode_tok_s), _share(row.decode_share),
            _one(row.prefill_tok_s), _share(row.prefill_share), _ms(row.ttft_p50_s), _ms(row.ttft_p99_s),
            _ms(row.itl_p50_s), _ms(row.itl_p99_s), _share(row.spread),
        )
        for row in report.rows
    ]  # fmt: skip
    return _table(title, (*columns, "ITL ms", "p99", "spread"), rows, width)


def _latency(report: LatencyReport, width: int) -> str:
    costs, ceilings = report.subject.costs, report.subject.ceilings
    read = costs.kv_bytes(1000) / ceilings.read_gb_s / 1e9
    compute = costs.flops_per_token / ceilings.gflops / 1e9
    text = _steps("One request by its context", report.by_context, report.sweep.steps, width)
    text += _line(report.context_line, 1000, "1,000 tokens of context", f"reading their K/V takes {_ms(read)} ms")
    title = f"Requests at a context of {report.sweep.contexts[0]}"
    text += _steps(title, report.by_batch, report.sweep.steps, width)
    text += _line(report.batch_line, 1, "request", f"a token's arithmetic takes {_ms(compute)} ms")
    return text + "".join(f"Left out: {reason}\n" for reason in report.left_out)


def _steps(title: str, rows: tuple[Latency, ...], steps: int, width: int) -> str:
    columns = ("batch", "context", "step ms", "p99", "bound ms", "of bound", "tok/s", "first token ms")
    cells = [
        (
            str(row.batch), f"{row.context:,}", _ms(row.step_s), _ms(row.step_p99_s), _ms(row.bound_s),
            _share(row.bound_s / row.step_s), _one(row.batch / row.step_s), _ms(row.first_token_s),
        )
        for row in rows
    ]  # fmt: skip
    return _table(f"{title}, medians of {steps} steps", columns, cells, width)


def _line(line: Line | None, unit: float, per: str, bound: str) -> str:
    if line is None:
        return ""
    return (
        f"A step takes {_ms(line.intercept)} ms and {_ms(line.slope * unit)} ms per {per} ({bound}); the points lie "
        f"within {line.worst:.0%} of that line.\n\n"
    )


def _scaling(report: ScalingReport, width: int) -> str:
    load = report.load
    title = f"{load.input_len} tokens in, {load.output_len} out, medians of {load.rounds} rounds"
    columns = ("weights, M", "width", "layers", "at once", "decode tok/s", "of bound", "prefill tok/s", "of bound")
    rows = [
        (
            f"{row.parameters / 1e6:.1f}", str(row.width), str(row.layers), str(row.concurrency),
            _one(row.decode_tok_s), _share(row.decode_share), _one(row.prefill_tok_s), _share(row.prefill_share),
        )
        for row in report.rows
    ]  # fmt: skip
    text = _table(title, columns, rows, width)
    for count in load.concurrency:
        line = report.line(count)
        if line is not None:
            text += f"{count} at a time: decoded tokens a second grow with weights to the power of {line.slope:.2f}"
            text += " (-1: twice the weights, half the speed, as where reading or arithmetic bounds it).\n"
    return text


def _serve(report: ServeReport, width: int) -> str:
    load = report.load
    rate = "one after the other" if load.request_rate is None else f"{load.request_rate:g} arriving a second"
    title = (
        f"{report.url}: {load.input_len} tokens in, {load.output_len} out, {load.per_client} requests a client, {rate}"
    )
    columns = ("clients", "requests", "failed", "output tok/s", "TTFT ms", "p99", "ITL ms", "p99", "p99/median")
    rows = [
        (
            str(row.clients), str(row.requests), str(row.failed), _one(row.output_tok_s), _ms(row.ttft_p50_s),
            _ms(row.ttft_p99_s), _ms(row.itl_p50_s), _ms(row.itl_p99_s), f"{row.itl_p99_s / row.itl_p50_s:.2f}",
            _one(row.offline_tok_s), f"{row.output_tok_s / row.offline_tok_s:.3f}",
        )
        for row in report.rows
    ]  # fmt: skip
    text = _table(title, (*columns, "offline tok/s", "of offline"), rows, width)
    return text + "".join(f"{note}\n" for note in report.notes)


def profiles_text(profiles: dict[str, Profile], width: int) -> str:
    """Return one table for each kind of step: a row a part, two columns for each of what was run."""
    kinds = dict.fromkeys(name.partition(", ")[0] for name in profiles)
    chosen = {kind: {name: one for name, one in profiles.items() if name.startswith(f"{kind}, ")} for kind in kinds}
    return "".join(_profile_table(kind, found, width) for kind, found in chosen.items())


def _profile_table(kind: str, profiles: dict[str, Profile], width: int) -> str:
    columns = ["part of a step"]
    for name in profiles:
        columns += [f"{name.partition(', ')[2]}\nms", "\nshare"]
    rows = [[part, *_cells(profiles, part)] for part in PARTS]
    rows.append(["all", *(cell for one in profiles.values() for cell in (_ms(one.total / one.steps), "100.0%"))])
    for part in dict.fromkeys(part for one in profiles.values() for part in one.bounds):
        reached = [_share(one.bounds[part] / one.seconds[part]) for one in profiles.values()]
        rows.append([f"{part}: of the bound", *(cell for share in reached for cell in ("", share))])
    costs = [
        f"{_ms(one.calls / one.steps * one.seconds_per_call)} ms ({one.overhead:.1%})" for one in profiles.values()
    ]
    return (
        _table(f"Where the time of a {kind} step goes, in a round of its own", columns, rows, width)
        + f"The profile itself takes of each step: {' · '.join(costs)}\n\n"
    )


def _cells(profiles: dict[str, Profile], part: str) -> list[str]:
    return [
        cell for one in profiles.values() for cell in (_ms(one.seconds[part] / one.steps), f"{one.share(part):.1%}")
    ]


def _table(title: str, columns: Any, rows: Any, width: int) -> str:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 and "part" in column else "right")
    for row in rows:
        table.add_row(*row)
    return "\n".join(line.rstrip() for line in render(table, width).splitlines()) + "\n\n"


# ------------------------------------------------------------------------------------------------ numbers


def _ms(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds * 1e3:.2f}"


def _one(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0%}"


def _lines(report: Report) -> dict[str, Any]:
    """The fitted lines, which are properties of a report."""
    if isinstance(report, LatencyReport):
        found = {"context_line": report.context_line, "batch_line": report.batch_line}
    elif isinstance(report, ScalingReport):
        found = {f"line_{count}": report.line(count) for count in report.load.concurrency}
    else:
        return {}
    return {name: None if line is None else asdict(line) for name, line in found.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
