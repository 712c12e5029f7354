"""What did quantizing cost? A float model and its quantized version, both as they are served, on the same text.

Both run the text through the real engine, kernels and all; every position's next-token distribution is compared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.config import EngineConfig
from core.engine import Engine
from core.engine_build import build_engine
from core.layers import QuantizedTensor
from core.plugins import PluginHost
from core.quantize.calibration import cut_samples, measuring_text
from core.verify_layers import modules_of
from core.verify_measure import divergence
from core.verify_served import ForcedRun

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
Progress = Callable[[int, int], None]  # samples that are done, samples in all


@dataclass(frozen=True)
class Side:
    """One of the two models."""

    path: str
    impl_name: str
    quantization: str | None
    perplexity: float
    disk_bytes: int  # of the weight files
    memory_bytes: int  # of all tensors that the served model holds


@dataclass(frozen=True)
class EvalQuantReport:
    """What `core-serve eval-quant` found."""

    floats: Side
    quantized: Side
    tokens: int  # positions that were compared
    kl_mean: float  # KL(floats || quantized) of the next token, in nats
    kl_median: float
    kl_p99: float
    top1_agreement: float  # share of positions where both prefer the same token
    seconds: float
    kl: tuple[float, ...]  # by position, for the plot

    @property
    def perplexity_ratio(self) -> float:
        return self.quantized.perplexity / self.floats.perplexity


def eval_quant(
    model: str,
    quantized: str | None,
    *,
    host: PluginHost,
    text: Path | None = None,
    samples: int | None = None,
    sample_length: int = 512,
    progress: Progress = lambda done, total: None,
    quantization: str | None = None,
    **options: Any,
) -> EvalQuantReport:
    """Compare `model` with `quantized`, or with itself under `quantization` on the fly; `options` are EngineConfig's.

    Raises CoreError if one of them cannot be served.
    """
    start = time.monotonic()
    blocks = -(-sample_length // 16) + 8
    config = EngineConfig.from_options(model=model, **options)
    config = replace(config, block_size=16, num_blocks=blocks, max_model_len=sample_length + 1)
    engines = [build_engine(config, host)]
    try:
        engines.append(build_engine(replace(config, model=quantized or model, quantization=quantization), host))
        tokenizer = host.tokenizer(host.open_checkpoint(model, config).spec, config)
        cut = cut_samples(tokenizer.encode, measuring_text(text), sample_length, samples)
        measured = _Measured()
        for done, sample in enumerate(cut):
            measured.take(sample, *(_logits(engine, sample) for engine in engines))
            progress(done + 1, len(cut))
        sides = [_side(engine, total / measured.tokens) for engine, total in zip(engines, measured.losses, strict=True)]
    finally:
        for engine in engines:
            engine.close()
    return measured.report(sides, time.monotonic() - start)


class _Measured:
    """Sums over samples."""

    def __init__(self) -> None:
        self.losses = [0.0, 0.0]  # nats, over all positions
        self.tokens, self.agreed = 0, 0
        self.kl: list[Tensor] = []

    def take(self, sample: Sequence[int], floats: Tensor, quantized: Tensor) -> None:
        """Logits [tokens, vocab] of each; the last position predicts nothing that is known."""
        targets = torch.tensor(list(sample[1:]))
        for side, logits in enumerate((floats, quantized)):
            self.losses[side] += float(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum"))
        self.tokens += len(targets)
        self.agreed += int((floats[:-1].argmax(-1) == quantized[:-1].argmax(-1)).sum())
        chunks = zip(floats[:-1].split(64), quantized[:-1].split(64), strict=True)  # float64 inside: some at a time
        self.kl += [divergence(one, other) for one, other in chunks]

    def report(self, sides: Sequence[Side], seconds: float) -> EvalQuantReport:
        kl = torch.cat(self.kl)
        return EvalQuantReport(
            floats=sides[0],
            quantized=sides[1],
            tokens=self.tokens,
            kl_mean=float(kl.mean()),
            kl_median=float(kl.median()),
            kl_p99=float(kl.quantile(0.99)),
            top1_agreement=self.agreed / self.tokens,
            seconds=seconds,
            kl=tuple(kl.tolist()),
        )


def _logits(engine: Engine, sample: Sequence[int]) -> Tensor:
    """Run one sample through an engine; return its logits, float32 [tokens, vocab]."""
    pieces: dict[int, Tensor] = {}

    def take(number: int, start: int, logits: Tensor, hidden: Any) -> None:
        pieces[start] = logits.float().cpu().clone()

    ForcedRun(engine, None, take, math.inf).run([(0, sample)])
    return torch.cat([pieces[start] for start in sorted(pieces)])[: len(sample)]


def _side(engine: Engine, loss: float) -> Side:
    info = engine.info
    memory = sum(size for _, size in _held(engine.model))
    return Side(info.model_path, info.impl_name, info.quantization, math.exp(loss), _on_disk(info.model_path), memory)


def _on_disk(path: str) -> int:
    where = Path(path)
    files = [where] if where.is_file() else [file for file in where.iterdir() if file.suffix in WEIGHT_SUFFIXES]
    return sum(file.stat().st_size for file in files)


def _held(model: object) -> Iterator[tuple[int, int]]:
    """Yield (identity, bytes) of every tensor that a served model holds, shared ones once."""
    seen: set[int] = set()
    for module in modules_of(model):
        for tensor in [*module.parameters(), *module.buffers()]:
            parts = list(tensor.parts.values()) if isinstance(tensor, QuantizedTensor) else [tensor]
            for part in parts:
                key = part.data_ptr() if part.layout == torch.strided else id(part)
                if key not in seen:
                    seen.add(key)
                    yield key, part.numel() * part.element_size()
