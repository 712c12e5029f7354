"""Which of transformers' causal language models are served right: all of them checked, and the table of what was found.

Results are appended to a file of JSON lines as they come, so that a survey that was cut off goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from core.supported_check import Checked, Served, check, start_context

SECONDS = 180.0  # for one step of one model type: a thousand times what it takes on an idle machine


def causal_models() -> dict[str, str]:
    """Return transformers' causal language models: class by model type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))


def choose(only: Sequence[str]) -> dict[str, str]:
    """Return the chosen models, all if none is named. Raises ConfigError for a name that is none of them."""
    known = causal_models()
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ConfigError(
            f"transformers has no causal language model of type {', '.join(map(repr, unknown))}; "
            f"it has {len(known)}: {', '.join(known)}."
        )
    return {name: known[name] for name in only} if only else known


def survey(
    models: Mapping[str, str], jobs: int, results: Path | None, on_result: Callable[[Checked], None], seconds: float
) -> list[Checked]:
    """Check models, `jobs` at a time, but for those that `results` holds of this transformers; return all, in order."""
    import transformers

    version = transformers.__version__
    done = {found.model_type: found for found in read_results(results) if found.transformers == version}
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models only get slower with more
    context = start_context()
    with ThreadPoolExecutor(jobs) as pool:
        missing = {name: class_name for name, class_name in models.items() if name not in done}
        started = [pool.submit(check, name, made, version, context, seconds) for name, made in missing.items()]
        try:
            for future in as_completed(started):
                found = future.result()
                done[found.model_type] = found
                _append(results, found)
                on_result(found)
        except BaseException:  # Ctrl-C above all: what has not begun need not
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [done[name] for name in models]


def read_results(results: Path | None) -> Iterable[Checked]:
    """Yield what a results file holds; where a model type has several lines, the last one counts."""
    if results is None or not results.exists():
        return
    for number, line in enumerate(results.read_text().splitlines(), 1):
        try:
            values = json.loads(line)
            served = {name: values[name] and Served(**values[name]) for name in ("auto", "fallback")}
            yield Checked(**{**values, **served})
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"Line {number} of {results} is no result of `core-serve supported-models` ({error}). "
                "Delete the line, and its model type is checked again."
            ) from error


def _append(results: Path | None, found: Checked) -> None:
    if results is not None:
        with results.open("a") as file:
            file.write(json.dumps(asdict(found)) + "\n")


# ------------------------------------------------------------------------------------------------ the table


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


INTRODUCTION = """# Supported models

Written by `core-serve supported-models`. For each causal language model of transformers {version} it builds a tiny
random checkpoint, serves it on the CPU with `--model-impl auto` and with `transformers`, and compares greedy tokens and
their logprobs with those of `generate`: several requests together, prompts cut into chunks, prefix cache cold and warm.
The fallback's tiers are explained in the [README](../README.md).
"""
TABLE_HEAD = ("| model type | class | native | fallback tier | verdict |", "|---|---|---|---|---|")


def markdown(found: Sequence[Checked], version: str) -> str:
    """Return the page: what was done, a count, a row for each model type."""
    rows = [" | ".join(("", *(_cell(cell) for cell in _row(each)), "")).strip() for each in found]
    return "\n".join([INTRODUCTION.format(version=version), *_counts(found), "", *TABLE_HEAD, *rows, ""])


def _row(found: Checked) -> tuple[str, ...]:
    native = found.auto.impl if found.auto and not found.auto.is_fallback else ""
    tier = found.fallback.impl.removeprefix("transformers/") if found.fallback else ""
    return f"`{found.model_type}`", f"`{found.class_name}`", native or "-", tier or "-", verdict(found)


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
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
