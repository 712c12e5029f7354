"""Every kernel variant of the model list, compiled for chips that are not here, and what is wrong with it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch

from core.kernels.chip import TARGETS, Launch, Target
from core.kernels.compile import Compiled, compile_launch, key_of
from core.kernels.model_shapes import MODELS, launches_of


@dataclass(frozen=True)
class Variant:
    """One piece of machine code on one chip."""

    kernel: str
    what: str  # the constants that tell it from its siblings
    models: tuple[str, ...]  # that launch it
    launch: Launch


@dataclass(frozen=True)
class Finding:
    """A variant, compiled."""

    target: str
    kernel: str
    what: str
    models: tuple[str, ...]
    compiled: Compiled | None  # None: it did not compile
    problems: tuple[str, ...]


@cache
def variants(target: str, dtype: str, models: tuple[str, ...] = ()) -> tuple[Variant, ...]:
    """Return what the models (all, if empty) launch on a chip, each variant once."""
    found: dict[tuple[object, ...], tuple[Launch, list[str]]] = {}
    for model in [model for model in MODELS if not models or model.name in models]:
        for launch in launches_of(model, getattr(torch, dtype), TARGETS[target]):
            _, users = found.setdefault(tuple(key_of(launch).values()), (launch, []))
            if model.name not in users:
                users.append(model.name)
    return tuple(
        Variant(launch.kernel.__name__.removesuffix("_kernel"), describe(launch), tuple(users), launch)
        for launch, users in found.values()
    )


SHOWN = {
    "K_DIM": "k",
    "V_DIM": "v",
    "DIM": "dim",
    "PADDED": "size",
    "BITS": "bits",
    "BLOCK_M": "m",
    "BLOCK_N": "n",
    "BLOCK_K": "block k",
}
FLAGS = {
    "WINDOW": "window",
    "CHUNK": "chunk",
    "SOFTCAP": "softcap",
    "TABLE": "table",
    "MERGED": "split",
    "MIDDLE": "middle",
    "INTERLEAVED": "interleaved",
}
OPTIONAL = ("sinks", "bias", "residual", "picked", "zeros", "offsets", "table", "beta", "z")


def describe(launch: Launch) -> str:
    """Say which variant this is, in a few words."""
    args = launch.args
    words = [f"{word} {args[name]}" for name, word in SHOWN.items() if name in args]
    words += [word for name, word in FLAGS.items() if args.get(name)]
    words += [name for name in OPTIONAL if args.get(name) is not None]
    words += [str(args["ACTIVATION"])] if "ACTIVATION" in args else []
    return ", ".join([*words, f"{launch.num_warps} warps", f"{launch.num_stages} stages"])


def problems_of(launch: Launch, compiled: Compiled, target: Target) -> tuple[str, ...]:
    """Say what makes a variant unfit for its chip."""
    found = []
    if compiled.spills:
        found.append(f"spills {compiled.spills}")
    if compiled.shared_memory > target.shared_memory:
        found.append(f"shared memory {compiled.shared_memory} of {target.shared_memory}")
    if launch.uses_tensor_cores and not compiled.tensor_cores:
        found.append("no tensor-core instructions")
    if launch.loads_wide and not compiled.wide_loads:
        found.append("no 16-byte loads")
    return tuple(found)


def compile_variant(target: str, dtype: str, models: tuple[str, ...], index: int) -> Finding:
    """Compile the variant of this index; a failure is a finding."""
    variant = variants(target, dtype, models)[index]
    compiled = None
    try:
        compiled = compile_launch(variant.launch, TARGETS[target])
        problems = problems_of(variant.launch, compiled, TARGETS[target])
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises, this variant does not compile
        problems = (f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}",)
    return Finding(target, variant.kernel, variant.what, variant.models, compiled, problems)


@dataclass(frozen=True)
class Selection:
    """What to compile."""

    targets: tuple[str, ...]
    dtype: str = "bfloat16"
    kernels: tuple[str, ...] = ()  # none: all
    models: tuple[str, ...] = ()  # none: all


def survey(asked: Selection, jobs: int = 1) -> Iterator[Finding]:
    """Compile every variant that is asked for, `jobs` at a time, in order."""
    work = [
        (target, asked.dtype, asked.models, index)
        for target in asked.targets
        for index, variant in enumerate(variants(target, asked.dtype, asked.models))
        if not asked.kernels or variant.kernel in asked.kernels
    ]
    if jobs == 1:
        yield from (compile_variant(*one) for one in work)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_variant, *zip(*work, strict=True))
