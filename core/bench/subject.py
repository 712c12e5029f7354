"""What is measured, and on what: the head of every report."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from core.bench.ceilings import Ceilings, measure_ceilings
from core.bench.costs import ModelCosts, model_costs
from core.bench.prompts import Prompts
from core.config import EngineConfig
from core.engine import Engine
from core.engine_build import build_engine, sized
from core.errors import ConfigError
from core.plugins import PluginHost


@dataclass(frozen=True)
class Subject:
    """The model as it is served, its costs, and the machine."""

    model: str
    impl_name: str
    attention: str
    quantization: str | None
    dtype: str
    device: str
    threads: int
    kernels: str | None
    torch_version: str
    load_average: float | None  # before the first measurement; None where the system keeps none
    cores: int
    ceilings: Ceilings
    costs: ModelCosts

    @property
    def is_quiet(self) -> bool:
        """False if other programs wanted the cores before the first measurement."""
        return self.load_average is None or self.load_average < 0.5 * self.cores


class Bench:
    """An engine that nothing else uses, and the prompts for it."""

    def __init__(self, engine: Engine, subject: Subject, prompts: Prompts) -> None:
        self.engine, self.subject, self.prompts = engine, subject, prompts


@contextmanager
def opened(config: EngineConfig, host: PluginHost, most_requests: int, text: Path | None = None) -> Iterator[Bench]:
    """Build an engine for up to `most_requests` at a time, measure the machine, close the engine at the end."""
    load = _load_average()
    config = replace(config, max_num_seqs=max(sized(config).max_num_seqs, most_requests))
    engine = build_engine(config, host)
    try:
        vocab = engine.info.vocab_size
        prompts = Prompts(vocab) if text is None else Prompts.of_file(text, engine.tokenizer, vocab)
        yield Bench(engine, _subject(engine, config, host, load), prompts)
    finally:
        engine.close()


def _subject(engine: Engine, config: EngineConfig, host: PluginHost, load: float | None) -> Subject:
    info = engine.info
    kernels = host.kernels(info.device, config)
    return Subject(
        model=info.model_path,
        impl_name=info.impl_name,
        attention=info.attention_name,
        quantization=info.quantization,
        dtype=info.dtype,
        device=info.device,
        threads=torch.get_num_threads(),
        kernels=None if kernels is None else kernels.name,
        torch_version=torch.__version__,
        load_average=load,
        cores=_cores(),
        ceilings=measure_ceilings(engine.runner.device.device, getattr(torch, info.dtype), kernels),
        costs=model_costs(engine.model, host.open_checkpoint(info.model_path, config).spec.config),
    )


def check_fits(engine: Engine, input_len: int, output_len: int) -> None:
    """Raise ConfigError if such a request is too long for the model."""
    limit = engine.info.max_model_len
    if input_len + output_len > limit:
        raise ConfigError(
            f"{input_len} tokens in and {output_len} out are longer than this model's {limit}. "
            "Ask for less with --input-len and --output-len."
        )


def _load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
