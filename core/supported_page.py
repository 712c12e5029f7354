"""docs/supported-models.md: what a survey found, as a page that two runs of the same code write alike.

Reasons are kept on the page only as far as they are the same on every machine: without numbers that were measured,
addresses and temporary folders.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from core.supported_check import Checked, Served

INTRODUCTION = """# Supported models

Written by `make supported-models`, compared with a fresh run by `make conformance`. For each causal language model of
transformers {version} a tiny random checkpoint is built, served on the CPU with `--model-impl auto` and with
`transformers`, and its greedy tokens and their logprobs are compared with those of `generate`: several requests
together, prompts cut into chunks, prefix cache cold and warm. The fallback's tiers are explained in the
[README](../README.md). `core-serve supported-models` does the same for the transformers that is installed.
"""
TABLE_HEAD = ("| model type | class | native | fallback tier | verdict |", "|---|---|---|---|---|")
REASON = 240  # characters of a reason on the page; the results file has it whole
VARYING = (  # what differs from machine to machine -> what stands for it
    (re.compile(r"(/[\w.+-]+)*/tmp[\w.+-]*(/[\w.+-]+)*"), "the checkpoint"),
    (re.compile(r"0x[0-9a-f]{6,}"), "0x…"),
    (re.compile(r"-?\d+\.\d+(e[+-]?\d+)?|\b-?\d+e[+-]?\d+\b"), "…"),
)


def verdict(found: Checked) -> str:
    """Say in a few words how a model type is served."""
    if found.unbuilt:
        return f"cannot be built: {found.unbuilt}"
    if found.auto is None or found.fallback is None:
        return f"no reference: {found.unsure}"
    said = {name: _words(served) for name, served in (("auto", found.auto), ("transformers", found.fallback))}
    text = said["auto"] if said["auto"] == said["transformers"] else "; ".join(f"{k}: {v}" for k, v in said.items())
    if found.unsure:
        return f"no self-consistent reference (generate with and without cache differ); against generate with: {text}"
    return text


def _words(served: Served) -> str:
    return f"{served.verdict}: {served.reason}" if served.reason else served.verdict


def short(found: Checked) -> str:
    """A line of progress."""
    impl = found.auto.impl if found.auto else ""
    return f"{found.model_type:26} {impl:20} {verdict(found)[:160]}"


def steady(reason: str) -> str:
    """Return a reason without what differs from run to run or from machine to machine."""
    for pattern, instead in VARYING:
        reason = pattern.sub(instead, reason)
    return reason if len(reason) <= REASON else reason[:REASON].rstrip() + " …"


# ------------------------------------------------------------------------------------------------ writing


def markdown(found: Sequence[Checked], version: str) -> str:
    """Return the page: what was done, a count, a row for each model type."""
    rows = [" | ".join(("", *(_cell(cell) for cell in _row(each)), "")).strip() for each in found]
    return "\n".join([INTRODUCTION.format(version=version), *_counts(found), "", *TABLE_HEAD, *rows, ""])


def _row(found: Checked) -> tuple[str, ...]:
    native = found.auto.impl if found.auto and not found.auto.is_fallback else ""
    tier = found.fallback.impl.removeprefix("transformers/") if found.fallback else ""
    return f"`{found.model_type}`", f"`{found.class_name}`", native or "-", tier or "-", steady(verdict(found))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _counts(found: Sequence[Checked]) -> list[str]:
    counts: Counter[str] = Counter(verdict(each).split(":")[0].split(" (")[0] for each in found)
    tiers: Counter[str] = Counter(each.fallback.impl for each in found if each.fallback and each.fallback.impl)
    return [
        f"{len(found)} model types: {_listed(counts)}.",
        f"Fallback: {_listed(tiers) or 'none'}.",
    ]


def _listed(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


# ------------------------------------------------------------------------------------------------ comparing


def differences(committed: str, fresh: str, rows_only: bool = False) -> list[str]:
    """Compare two pages; return a line for each model type whose row differs, and for each other line that does.

    `rows_only`: `fresh` is of chosen model types, so that its counts and the rows that it lacks say nothing.
    """
    stated, found = _rows_of(committed), _rows_of(fresh)
    names = list(found) if rows_only else sorted({*stated, *found})
    unequal = [name for name in names if stated.get(name) != found.get(name)]
    lines = [f"{name}: {_unequal(stated.get(name), found.get(name))}" for name in unequal]
    return lines if rows_only else lines + list(_other_lines(committed, fresh))


def _unequal(stated: str | None, found: str | None) -> str:
    if stated is None:
        return f"is not on the page; found {found}"
    if found is None:
        return f"the page has {stated}, but this transformers has no such model type"
    return f"the page has {stated}; found {found}"


def _rows_of(page: str) -> dict[str, str]:
    """The rest of each row, by model type."""
    rows = (re.match(r"\| `([^`]+)` (\|.*\|)$", line) for line in page.splitlines())
    return {row[1]: row[2] for row in rows if row}


def _other_lines(committed: str, fresh: str) -> Iterator[str]:
    pages = ([line for line in page.splitlines() if not line.startswith("| `")] for page in (committed, fresh))
    for stated, found in zip_longest(*pages, fillvalue=""):
        if stated != found:
            yield f"the page has the line {stated!r}; now it is {found!r}"
