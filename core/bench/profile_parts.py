"""Which functions of an engine and its model are which part of a step: by kind of module, never by a model's name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from core.bench.costs import all_modules
from core.engine import Engine
from core.kernel_contracts import DecoderKernel
from core.layers import LayerStack, RMSNorm, Rotary, ScreenedHead

SCHEDULE, BATCH, LINEARS, ATTENTION = "schedule", "batch and plan", "linears", "attention"
SMALL, SAMPLING, EMIT = "norm, rotary, activation", "sampling", "detokenize and emit"
MODEL, REST = "rest of the model", "rest of the step"
PARTS = (SCHEDULE, BATCH, LINEARS, ATTENTION, SMALL, MODEL, SAMPLING, EMIT, REST)
KERNEL_PARTS = {"linears": LINEARS, "attention": ATTENTION, "small": SMALL}  # of a core.kernel_contracts.DecoderKernel
ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")


@dataclass(frozen=True)
class Hook:
    """A function that is timed: an attribute of an object, a class or a Python module."""

    owner: Any
    name: str
    part: str
    kernel: DecoderKernel | None = None  # one that the function calls, which measures its own parts


def hooks_of(engine: Engine) -> list[Hook]:
    """Return what is timed in this engine. A part that is not recognised stays in the part around it."""
    return [*_engine_hooks(engine), *_model_hooks(engine), *_joined_hooks(engine), *_rotary_hooks(engine)]


def _engine_hooks(engine: Engine) -> Iterator[Hook]:
    runner = engine.runner
    yield Hook(engine, "step", REST)
    yield Hook(engine, "_emit", EMIT)
    for name in ("schedule", "advance", "complete"):
        yield Hook(engine.scheduler, name, SCHEDULE)
    yield Hook(runner, "run", BATCH)
    yield Hook(runner.model, "forward", MODEL)
    yield Hook(engine.sampler, "sample", SAMPLING)
    if runner.attention is not None and runner.has_kv:
        yield Hook(runner.attention, "attend", ATTENTION)


def _model_hooks(engine: Engine) -> Iterator[Hook]:
    host_attends = engine.runner.has_kv
    for module in all_modules(engine.model):
        part = _part_of(module, host_attends)
        if part is not None:
            yield Hook(module, "forward", part)
        if isinstance(module, RMSNorm):
            yield Hook(module, "add", SMALL)
        elif isinstance(module, Rotary):
            yield Hook(module, "rotate", SMALL)


def _joined_hooks(engine: Engine) -> Iterator[Hook]:
    """What runs parts of several modules, or of one in another way, beside their own forward."""
    found = {id(value): value for module in all_modules(engine.model) for value in vars(module).values()}
    for joined in found.values():
        if isinstance(joined, LayerStack):
            yield Hook(joined, "run", MODEL, joined.kernel)
        elif isinstance(joined, ScreenedHead):
            yield Hook(joined, "highest", LINEARS)


def _part_of(module: nn.Module, host_attends: bool) -> str | None:
    """`host_attends`: the attention itself is the backend's, and the module around it is the model's rest."""
    kind, home = type(module).__name__, type(module).__module__
    if hasattr(module, "in_features") or kind == "Conv1D" or "Experts" in kind:
        return LINEARS
    if "Norm" in kind or "Rotary" in kind or home in ACTIVATIONS or kind.endswith("MLP"):
        return SMALL  # of an MLP: what is not in its linears
    if "Attention" in kind and not host_attends:
        return ATTENTION
    return None


def _rotary_hooks(engine: Engine) -> Iterator[Hook]:
    """Functions that rotate are no modules: they are found by name beside the classes of the model's modules."""
    for home in {type(module).__module__ for module in all_modules(engine.model)}:
        for name, value in vars(sys.modules[home]).items():
            if name.startswith("apply_rotary") and callable(value):
                yield Hook(sys.modules[home], name, SMALL)
