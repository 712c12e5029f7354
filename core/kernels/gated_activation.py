"""The gate of a feed-forward block: out = act(gate) * up (Shazeer 2020, "GLU variants improve Transformer").

    silu(x) = x / (1 + e^-x)        gelu(x) = x / 2 (1 + erf(x / sqrt 2))
    gelu_tanh(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))

x [tokens, 2 * inner], the gate's half first; out [tokens, inner]. act(gate) is rounded before it is multiplied, as
torch's operators one after the other do.
A program computes BLOCK elements of a row: 8 a thread. Shared memory: none.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from core.kernels.checks import FLOATS, check, require
from core.kernels.chip import Chip, Launch, chip_of
from core.kernels.numbers import rounded, sigmoid, tanh

NAME = "gated_activation"
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
BLOCK = 1024


@triton.jit
def gated_activation_kernel(
    x: tl.tensor,
    out: tl.tensor,
    x_token: tl.tensor,
    out_token: tl.tensor,
    inner: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = place < inner
    gate = tl.load(x + token * x_token + place, mask=there, other=0.0).to(tl.float32)
    up = tl.load(x + token * x_token + inner + place, mask=there, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        gate = gate * sigmoid(gate)
    elif ACTIVATION == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        gate = 0.5 * gate * (1.0 + tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    gate = rounded(gate, out.dtype.element_ty, WIDEN).to(tl.float32)
    tl.store(out + token * out_token + place, rounded(gate * up, out.dtype.element_ty, WIDEN), mask=there)


def gated_activation(x: Tensor, out: Tensor, activation: str = "silu", chip: Chip | None = None) -> None:
    """Fill `out` [tokens, inner] from x [tokens, 2 * inner]. Raises KernelError."""
    tokens, inner = out.shape
    check(NAME, "x", x, (tokens, 2 * inner), FLOATS, x)
    check(NAME, "out", out, (tokens, inner), (x.dtype,), x)
    known = ", ".join(ACTIVATIONS)
    require(NAME, activation in ACTIVATIONS, f"activation {activation!r} is unknown; there are {known}.")
    chip = chip or chip_of(x)
    args = {
        "x": x,
        "out": out,
        "x_token": x.stride(0),
        "out_token": out.stride(0),
        "inner": inner,
        "ACTIVATION": activation,
        "BLOCK": BLOCK,
        "WIDEN": chip.interpreted,
    }
    warps = 128 // chip.target.warp_size
    chip.run(Launch(gated_activation_kernel, (tokens, -(-inner // BLOCK)), args, num_warps=warps))
