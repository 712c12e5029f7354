"""`core-serve kernels`: the GPU kernels, compiled for chips that are not here."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from core.errors import ConfigError

if TYPE_CHECKING:
    from core.kernels.survey import Finding

DEFAULT_TARGETS = "sm_80,sm_90,sm_100,gfx942,gfx90a"


@click.group("kernels", short_help="Check the GPU kernels.")
def kernels() -> None:
    """The Triton kernels that attention and its surroundings run on, on CUDA and ROCm."""


@kernels.command("compile", short_help="Compile every kernel for GPUs that need not be here.")
@click.option("--targets", default=DEFAULT_TARGETS, show_default=True, metavar="A,B", help="GPU architectures.")
@click.option("--kernels", "names", default="", metavar="A,B", help="Only these kernels. Default: all.")
@click.option("--models", "shapes", default="", metavar="A,B", help="Only these models' shapes. Default: all.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Variants compiled at a time.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compile_kernels(targets: str, names: str, shapes: str, dtype: str, jobs: int, as_json: bool) -> int:
    """Compile every kernel variant that the engine can pick for a list of well-known models, for every target.

    Prints registers, spills, shared memory, tensor-core instructions and 16-byte loads. Ends with exit code 1 if a
    variant does not compile, spills, needs more shared memory than the chip has, or lacks the instructions it should
    have. No GPU is needed; all targets take about ten minutes on two idle cores, less again from Triton's cache.
    """
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("Compiling kernels needs Triton, which is not installed: pip install 'core-serve[gpu]'.")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ConfigError("Kernels cannot be compiled with TRITON_INTERPRET=1 in the environment; unset it.")
    from core.kernels.chip import TARGETS
    from core.kernels.model_shapes import MODELS
    from core.kernels.survey import Selection, survey, variants

    asked = Selection(_split(targets), dtype, _split(names), _split(shapes))
    _check("target", asked.targets, TARGETS)
    _check("model", asked.models, [model.name for model in MODELS])
    _check("kernel", asked.kernels, {one.kernel for target in asked.targets for one in variants(target, dtype)})
    found = []
    for finding in survey(asked, jobs):
        found.append(finding)
        if not as_json:
            click.echo(_line(finding))
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found], indent=2))
    bad = sum(bool(finding.problems) for finding in found)
    if not as_json:
        click.echo(f"{len(found)} variants, {bad} unfit")
    return int(bad > 0)


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _check(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in set(known):
            raise ConfigError(f"{kind} {name!r} is unknown; there are {', '.join(sorted(known))}.")


def _line(finding: Finding) -> str:
    verdict = "ok" if not finding.problems else "UNFIT: " + "; ".join(finding.problems)
    head = f"{finding.target:7} {finding.kernel:23}"
    if finding.compiled is None:
        return f"{head} {verdict} ({finding.what})"
    one = finding.compiled
    numbers = (
        f"{one.registers:3} registers {one.spills:3} spills {one.shared_memory:6} B shared {one.tensor_cores:4} mma"
    )
    return f"{head} {numbers} {one.wide_loads:3} wide loads  {verdict} ({finding.what})"
