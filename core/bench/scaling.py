"""`bench scaling`: tokens a second by the size of the model, over random Llamas that are made on the fly."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from core.bench.numbers import Line, fit
from core.bench.subject import Subject, opened
from core.bench.throughput import Load, Progress, measure_throughput
from core.config import EngineConfig
from core.engine_build import offline
from core.plugins import PluginHost
from core.testing_checkpoints import tiny_checkpoint

VOCAB = 8192
HEAD_DIM = 64
STEP = 64  # widths are multiples of it


@dataclass(frozen=True)
class Shape:
    """A Llama whose layers are as many as its heads, so that width and depth grow together."""

    width: int

    @property
    def heads(self) -> int:
        return self.width // HEAD_DIM

    @property
    def inner(self) -> int:
        return math.ceil(self.width * 8 / 3 / STEP) * STEP

    @property
    def kv_heads(self) -> int:
        """A third of the heads where that divides, else all: grouped as small models group them."""
        return self.heads // 3 if self.heads % 3 == 0 else self.heads

    @property
    def parameters(self) -> int:
        """Weights, the norms left out; embedding and head are one."""
        kv = self.kv_heads * HEAD_DIM
        layer = 2 * self.width**2 + 2 * self.width * kv + 3 * self.width * self.inner
        return self.heads * layer + VOCAB * self.width

    @classmethod
    def nearest(cls, parameters: int) -> Shape:
        """Return the shape whose number of weights is nearest."""
        width = STEP
        while cls(width + STEP).parameters < parameters:
            width += STEP
        return min((cls(width), cls(width + STEP)), key=lambda shape: abs(shape.parameters - parameters))


@dataclass(frozen=True)
class Size:
    """One model, at one number of requests."""

    parameters: int
    width: int
    layers: int
    concurrency: int
    decode_tok_s: float
    prefill_tok_s: float
    decode_share: float  # of the roofline
    prefill_share: float


@dataclass(frozen=True)
class ScalingReport:
    subject: Subject  # the largest model's
    load: Load
    rows: tuple[Size, ...]

    def line(self, concurrency: int) -> Line | None:
        """log10 of decoded tokens a second by log10 of the number of weights: -1 where twice the size halves it."""
        rows = [row for row in self.rows if row.concurrency == concurrency]
        return fit([math.log10(row.parameters) for row in rows], [math.log10(row.decode_tok_s) for row in rows])


def measure_scaling(
    config: EngineConfig, host: PluginHost, sizes: tuple[int, ...], load: Load, progress: Progress
) -> ScalingReport:
    """`config` says how the models are served; its `model` is not looked at."""
    rows: list[Size] = []
    for shape in sorted({Shape.nearest(size) for size in sizes}, key=lambda shape: shape.width):
        progress(f"making a model of {shape.parameters / 1e6:.0f} M weights")
        with _checkpoint(shape, load.input_len + load.output_len) as folder:
            served = replace(config, model=str(folder), skip_tokenizer_init=True)
            with opened(offline(served), host, max(load.concurrency)) as bench:
                report = measure_throughput(bench, load, False, progress)
        rows += [
            Size(
                shape.parameters, shape.width, shape.heads, row.concurrency, row.decode_tok_s, row.prefill_tok_s,
                row.decode_share, row.prefill_share,
            )
            for row in report.rows
        ]  # fmt: skip
    return ScalingReport(replace(report.subject, model="random Llamas"), load, tuple(rows))


@contextmanager
def _checkpoint(shape: Shape, length: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="core-serve-bench-") as folder:
        yield tiny_checkpoint(
            "llama",
            folder,
            max_weights=2 * shape.parameters,
            vocab_size=VOCAB,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.heads,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=HEAD_DIM,
            max_position_embeddings=length,
            tie_word_embeddings=True,
        )
