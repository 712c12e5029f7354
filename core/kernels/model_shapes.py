"""The models whose shapes every kernel must compile for, and what each of them launches in a step.

Launches are recorded by the wrappers themselves on tensors without memory, so they are what the engine would launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.contracts import AttentionArgs
from core.kernels.attention_call import PagedCall
from core.kernels.chip import Launch, RecordingChip, Target
from core.kernels.dequant_matmul import Codes, dequant_matmul
from core.kernels.gated_activation import gated_activation
from core.kernels.gated_linear_attention import gated_linear_attention
from core.kernels.grouped_matmul import grouped_matmul
from core.kernels.mamba2_step import mamba2_step
from core.kernels.paged_decode import paged_decode
from core.kernels.paged_prefill import paged_prefill
from core.kernels.rms_norm import rms_norm
from core.kernels.rotary import rotary
from core.kernels.sample import sample
from core.kernels.write_kv import write_kv

BLOCK_SIZE = 16
BLOCKS = 4096
REQUESTS = 33  # an odd number of rows, as most steps have
PROMPT = 1021


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides which kernel variants it needs."""

    name: str
    hidden: int
    inner: int  # of a dense layer or of one expert
    vocab: int
    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    rotated: int  # dimensions of a head
    windows: tuple[int | None, ...] = (None,)
    softcap: float | None = None
    has_sinks: bool = False
    bias: str = ""  # "slopes" (ALiBi) or "table" (T5)
    activation: str = "silu"
    plus_one: bool = False  # Gemma's norm: its weight is float32, 1 + the stored one
    interleaved: bool = False  # rotary pairs
    norms_heads: bool = False  # RMSNorm of each head of Q and K
    experts: int = 0
    delta_heads: int = 0  # heads of gated linear attention, 128 x 128
    mamba_heads: int = 0  # of 64 x 128


MODELS = (
    ModelShape("Llama-3-8B", 4096, 14336, 128256, 32, 8, 128, 128, 128),
    ModelShape("Llama-3-70B", 8192, 28672, 128256, 64, 8, 128, 128, 128),
    ModelShape("Qwen3-30B-A3B", 2048, 768, 151936, 32, 4, 128, 128, 128, norms_heads=True, experts=128),
    ModelShape(
        "Gemma-3-12B", 3840, 15360, 262208, 16, 8, 256, 256, 256, (1024, None), activation="gelu_tanh", plus_one=True,
        norms_heads=True,
    ),
    ModelShape("DeepSeek-V3", 7168, 2048, 129280, 128, 128, 192, 128, 64, interleaved=True, experts=256),
    ModelShape("gpt-oss-20b", 2880, 2880, 201088, 64, 8, 64, 64, 64, (128, None), has_sinks=True, experts=32),
    ModelShape("Mistral-7B", 4096, 14336, 32000, 32, 8, 128, 128, 128, (4096,)),
    # Not asked for by name, but what the contract and the rows tier can ask for beyond them.
    ModelShape("Gemma-2-9B", 3584, 14336, 256000, 16, 8, 256, 256, 256, (4096, None), 50.0, plus_one=True),
    ModelShape("DeepSeek-V3, absorbed", 7168, 2048, 129280, 128, 1, 576, 512, 64, interleaved=True, experts=256),
    ModelShape("MPT-7B", 4096, 16384, 50432, 32, 32, 128, 128, 128, bias="slopes"),
    ModelShape("T5-XL's decoder", 2048, 5120, 32128, 32, 32, 64, 64, 64, bias="table"),
    ModelShape("T5-11B's decoder", 1024, 65536, 32128, 128, 128, 128, 128, 128, bias="table"),
    ModelShape("Phi-2", 2560, 10240, 51200, 32, 32, 80, 80, 32),
    ModelShape(
        "Qwen3-Next-80B", 2048, 512, 151936, 16, 2, 256, 256, 64, plus_one=True, norms_heads=True, experts=512,
        delta_heads=32,
    ),
    ModelShape("Mamba-2-2.7B", 2560, 10240, 50288, 0, 0, 64, 64, 64, mamba_heads=80),
)  # fmt: skip


class Step:
    """The wrappers' calls of one model's prefill and decode, on tensors without memory."""

    def __init__(self, model: ModelShape, dtype: torch.dtype, target: Target) -> None:
        self.model, self.dtype, self.chip = model, dtype, RecordingChip(target)

    def made(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def ints(self, *shape: int) -> Tensor:
        return self.made(*shape, dtype=torch.int32)

    def longs(self, *shape: int) -> Tensor:
        return self.made(*shape, dtype=torch.int64)

    def attention(self) -> None:
        model = self.model
        if model.heads == 0:
            return
        keys, values = (self.made(BLOCKS, BLOCK_SIZE, model.kv_heads, dim) for dim in (model.k_dim, model.v_dim))
        call = PagedCall(keys, values, self.longs(REQUESTS, 65), self.ints(REQUESTS + 1), self.ints(REQUESTS))
        k, v = (self.made(PROMPT, model.kv_heads, dim) for dim in (model.k_dim, model.v_dim))
        write_kv(k, v, keys, values, self.longs(PROMPT), self.chip)
        q, out = (self.made(PROMPT, model.heads, dim) for dim in (model.k_dim, model.v_dim))
        for window in model.windows:
            sinks = self.made(model.heads) if model.has_sinks else None
            args = AttentionArgs(0.1, window=window, softcap=model.softcap, sinks=sinks, bias=self.bias())
            paged_prefill(q, out, call, self.ints(REQUESTS, 2), args, self.chip)
            for splits in (1, 7):
                paged_decode(q, out, call, self.ints(REQUESTS), splits, args, self.chip)

    def bias(self) -> Tensor | None:
        sizes = {"slopes": (self.model.heads,), "table": (self.model.heads, 128)}
        return self.made(*sizes[self.model.bias], dtype=torch.float32) if self.model.bias else None

    def rows(self) -> None:
        model, rows = self.model, REQUESTS
        x, out = self.made(rows, model.hidden), self.made(rows, model.hidden)
        weight = self.made(model.hidden, dtype=torch.float32 if model.plus_one else self.dtype)
        for residual, picked in ((None, None), (out, None), (None, self.longs(rows))):
            rms_norm(x, weight, 1e-6, out, residual, picked, self.chip)
        for heads in {model.heads, model.kv_heads} - {0}:
            whole = self.made(rows, 2 * heads * model.k_dim)  # Q or K beside others
            x_of_heads, angles = (
                whole[:, : heads * model.k_dim].view(rows, heads, -1),
                self.made(rows, model.rotated // 2),
            )
            rotary(x_of_heads, angles, angles, x_of_heads, model.interleaved, self.chip)
            if model.norms_heads:
                by_head = self.made(model.k_dim, dtype=weight.dtype)
                rms_norm(x_of_heads, by_head, 1e-6, self.made(rows, heads, model.k_dim), chip=self.chip)
        gated_activation(self.made(rows, 2 * model.inner), self.made(rows, model.inner), model.activation, self.chip)
        doubles, longs = self.made(rows, dtype=torch.float64), self.longs(rows)
        logits = self.made(rows, model.vocab)
        sample(logits, doubles, self.ints(rows), doubles, doubles, longs, longs, longs, self.chip)

    def quantized(self) -> Sequence[Codes]:
        """Return a weight in each of the formats that there are kernels for."""
        out, size = self.model.inner, self.model.hidden
        group = 128 if size % 128 == 0 else 32
        nibbles, bytes_ = (self.made(out, width, dtype=torch.uint8) for width in (size // 2, size))
        scales, floats, zeros = (
            self.made(out, size // group, dtype=dtype) for dtype in (self.dtype, torch.float32, torch.uint8)
        )
        row = self.made(out, 1, dtype=torch.float32)
        return (
            Codes(nibbles, scales, 4, group, size, zeros=zeros),  # AWQ, GPTQ
            Codes(nibbles, scales, 4, group, size, middle=8),
            Codes(nibbles, scales, 4, group, size, offsets=scales),
            Codes(bytes_, scales, 8, group, size, zeros=zeros),
            Codes(bytes_, row, 8, size, size, middle=128),  # int8
            Codes(nibbles, floats, 4, group, size, table=self.made(16, dtype=torch.float32)),  # NF4
            Codes(bytes_, floats, 8, group, size, table=self.made(256, dtype=torch.float32)),  # float8, in blocks
            Codes(bytes_, row, 8, size, size, table=self.made(256, dtype=torch.float32)),
        )

    def experts(self) -> tuple[Tensor, Tensor | None]:
        count, out, size = self.model.experts, self.model.inner, self.model.hidden
        if self.model.has_sinks:  # gpt-oss keeps its experts input first, and gives them a bias
            return self.made(count, size, out).transpose(1, 2), self.made(count, out)
        return self.made(count, out, size), None

    def matrices(self) -> None:
        model, size = self.model, self.model.hidden
        weights = self.quantized()
        for rows in (1, REQUESTS, PROMPT):
            x, y = self.made(rows, size), self.made(rows, model.inner)
            for weight in weights:
                dequant_matmul(x, weight, y, chip=self.chip)
            if model.experts:
                experts, bias = self.experts()
                routed = rows * 8
                grouped_matmul(
                    x, experts, self.ints(model.experts + 1), self.made(routed, model.inner), self.ints(routed),
                    bias, self.chip,
                )  # fmt: skip

    def states(self) -> None:
        if heads := self.model.delta_heads:
            q, by_head = self.made(REQUESTS, heads, 128), self.made(REQUESTS, heads)
            state = self.made(64, heads, 128, 128, dtype=torch.float32)
            slots = self.longs(REQUESTS)
            for beta in (None, by_head):
                gated_linear_attention(state, q, q, q, by_head, slots, q, 0.1, beta, self.chip)
        if heads := self.model.mamba_heads:
            x, of_head = self.made(REQUESTS, heads, 64), self.made(heads)
            b, dt = self.made(REQUESTS, 1, 128), self.made(REQUESTS, heads)
            state = self.made(64, heads, 64, 128, dtype=torch.float32)
            mamba2_step(state, x, dt, of_head, of_head, b, b, of_head, self.longs(REQUESTS), x, x, chip=self.chip)


def launches_of(model: ModelShape, dtype: torch.dtype, target: Target) -> Sequence[Launch]:
    """Return every launch that serving `model` in `dtype` can make on `target`."""
    step = Step(model, dtype, target)
    parts: Sequence[Callable[[], None]] = (step.attention, step.rows, step.matrices, step.states)
    for part in parts:
        part()
    return step.chip.launches
