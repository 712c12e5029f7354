"""Rotary position embedding (Su et al. 2021) and its scalings for longer contexts.

default   theta^(-2i/d)
linear    positions divided by a factor (Chen et al. 2023)
dynamic   theta grows with the length of the text (NTK-aware, Peng and Quesnelle 2023); evaluated for each request
llama3    low frequencies divided by a factor, high ones kept, a ramp between (Llama 3.1, 2024)
yarn      the same idea with another ramp, and a factor on the attention (Peng et al. 2023)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core.batch import Batch

if TYPE_CHECKING:
    from core.kernel_contracts import Kernels, RotaryKernel

LEAST_POSITIONS = 1024  # of a table
SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")


class RotaryError(ValueError):
    """The config's rope parameters are not supported; the message names them."""


class Rotary(nn.Module):
    """Cosines and sines for the tokens of a batch. `parameters` is transformers' `rope_parameters`."""

    def __init__(self, dim: int, max_positions: int, parameters: Mapping[str, Any], device: torch.device) -> None:
        super().__init__()
        self.kind = str(parameters.get("rope_type", parameters.get("type", "default")))
        if self.kind not in SCALINGS:
            raise RotaryError(f"rope type {self.kind!r} is not supported; supported: {', '.join(SCALINGS)}")
        if float(parameters.get("partial_rotary_factor", 1.0)) != 1.0:
            raise RotaryError("partial_rotary_factor other than 1 is not supported")
        self.dim, self.rope = dim, parameters
        self.theta = float(parameters.get("rope_theta", 10000.0))
        # transformers' dynamic rope grows from max_position_embeddings, whatever else the parameters say.
        stated = None if self.kind == "dynamic" else parameters.get("original_max_position_embeddings")
        self.original = int(stated or max_positions)
        self.factor = float(parameters.get("factor") or 1.0)
        self.attention_factor = 1.0
        with torch.device("cpu"):  # not the device of a model that is built without memory
            inverse = self._inverse(max_positions)
        self.inverse = inverse.to(device)  # [dim / 2] float32
        self.kernels: dict[torch.dtype, RotaryKernel | None] = {}
        self._tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}  # of a CPU: cos and sin, [positions, 1, dim]

    def take_kernels(self, kernels: Kernels) -> None:
        """Compute with a device's kernels from now on."""
        self.kernels = {dtype: kernels.rotary(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}

    @property
    def depends_on_length(self) -> bool:
        """True if a token's rotation depends on how long its text is, so that K cannot be shared between texts."""
        return self.kind == "dynamic"

    def forward(self, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin [tokens, 1, dim] in `dtype`."""
        if self.depends_on_length:
            return self._turned(batch.positions, self._dynamic(batch), dtype)
        if self.inverse.device.type != "cpu":
            return self._turned(batch.positions, self.inverse[None], dtype)
        cos, sin = self._table(max(batch.context_lens), dtype)
        return cos.index_select(0, batch.positions), sin.index_select(0, batch.positions)

    def _turned(self, positions: Tensor, inverse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions[:, None].float() * inverse
        angles = torch.cat([angles, angles], -1).unsqueeze(1)
        return (angles.cos() * self.attention_factor).to(dtype), (angles.sin() * self.attention_factor).to(dtype)

    def _table(self, positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what turns every position below a number, at least: computed once, as often as that doubles."""
        found = self._tables.get(dtype)
        if found is None or len(found[0]) < positions:
            count = max(LEAST_POSITIONS, 1 << (positions - 1).bit_length())
            found = self._tables[dtype] = self._turned(torch.arange(count), self.inverse[None], dtype)
        return found

    def rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Return x [tokens, heads, dim] turned by what calling this gave; x itself may be overwritten."""
        kernel = self.kernels.get(x.dtype)
        if kernel is None:
            return apply_rotary(x, *rotation)
        kernel(x, *rotation)
        return x

    def _plain(self, theta: float | Tensor) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim
        return 1.0 / (theta**exponents)

    def _inverse(self, max_positions: int) -> Tensor:
        inverse = self._plain(self.theta)
        if self.kind == "linear":
            return inverse / self.factor
        if self.kind == "llama3":
            return self._llama3(inverse)
        if self.kind == "yarn":
            return self._yarn(inverse, max_positions)
        return inverse

    def _llama3(self, inverse: Tensor) -> Tensor:
        low, high = float(self.rope["low_freq_factor"]), float(self.rope["high_freq_factor"])
        turns = self.original * inverse / (2 * math.pi)  # full turns of each frequency within the original length
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1 = high frequency, unchanged
        return keep * inverse + (1 - keep) * inverse / self.factor

    def _yarn(self, inverse: Tensor, max_positions: int) -> Tensor:
        if not self.rope.get("factor"):
            self.factor = max_positions / self.original
        fast, slow = float(self.rope.get("beta_fast") or 32), float(self.rope.get("beta_slow") or 1)
        self.attention_factor = _yarn_attention_factor(self.rope, self.factor)
        low, high = (self._dimension_of(turns) for turns in (fast, slow))
        if self.rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        span = high - low if high != low else 0.001  # the ramp must not divide by zero
        ramp = ((torch.arange(self.dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
        return inverse / self.factor * ramp + inverse * (1 - ramp)

    def _dimension_of(self, turns: float) -> float:
        """The dimension whose frequency makes so many turns within the original length."""
        return self.dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    def _dynamic(self, batch: Batch) -> Tensor:
        """Inverse frequencies [tokens, dim / 2]: a prompt's tokens go by the prompt's length, later ones by their own.

        This is what `generate` does: the prompt in one go, then token by token.
        """
        prompts = torch.tensor([entry.request.num_prompt for entry in batch.scheduled])
        lens = prompts.repeat_interleave(torch.tensor(batch.query_lens)).to(batch.positions.device)
        length = torch.maximum(lens, batch.positions + 1).clamp(min=self.original).float()
        grown = self.factor * length / self.original - (self.factor - 1)
        theta = self.theta * grown ** (self.dim / (self.dim - 2))
        return self._plain(theta[:, None])


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(float(mscale)) / scale(float(all_dim)) if mscale and all_dim else scale(1.0)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [tokens, heads, dim] in halves: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin
