"""Rotary embedding: GGUF keys -> the rope_parameters of transformers. A scaling that is not understood is an error."""

from __future__ import annotations

from math import pi
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import CheckpointError
from core_gguf.reader import GGUFFile

FACTORS_TENSOR = "rope_freqs.weight"  # llama 3.1 and later: the divisor of each frequency, [head_dim / 2]
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_parameters(file: GGUFFile, arch: str, head_dim: int) -> dict[str, Any]:
    """Return rope_theta, rope_type and what that type needs."""
    _refuse_partial(file, arch, head_dim)
    theta = file.get(f"{arch}.rope.freq_base", float, 10000.0)
    if FACTORS_TENSOR in file.tensors:
        return {"rope_theta": theta, **_llama3(file, arch, float(theta or 0), head_dim)}
    return {"rope_theta": theta, **_scaling(file, arch)}


def _refuse_partial(file: GGUFFile, arch: str, head_dim: int) -> None:
    rotated = file.get(f"{arch}.rope.dimension_count", int, head_dim)
    if rotated != head_dim:
        raise CheckpointError(
            f"{file.path} rotates {rotated} of {head_dim} dimensions of a head; {arch} models rotate all of them."
        )


def _scaling(file: GGUFFile, arch: str) -> dict[str, Any]:
    kind = file.get(f"{arch}.rope.scaling.type", str, "none")
    old_style = file.get(f"{arch}.rope.scale_linear", float)  # files from before 2024 have only this
    factor = file.get(f"{arch}.rope.scaling.factor", float, old_style)
    if kind == "none" and old_style not in (None, 1.0):
        kind = "linear"
    if kind == "none" or (kind == "linear" and factor in (None, 1.0)):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, **_yarn(file, arch)}
    raise CheckpointError(f"{file.path} asks for rope scaling {kind!r}. Supported: none, linear, yarn, llama 3's.")


def _yarn(file: GGUFFile, arch: str) -> dict[str, Any]:
    scaling = f"{arch}.rope.scaling"
    for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
        value = file.get(f"{scaling}.{name}", float, 1.0)
        if value != 1.0:  # transformers' yarn has numbers of these names that mean something else
            raise CheckpointError(f"{file.path}: {scaling}.{name} is {value}; only 1.0 is supported.")
    found: dict[str, Any] = {
        "original_max_position_embeddings": file.require(f"{scaling}.original_context_length", int)
    }
    for key in ("beta_fast", "beta_slow"):
        value = file.get(f"{scaling}.yarn_{key}", float)
        if value is not None:
            found[key] = value
    return found


def _llama3(file: GGUFFile, arch: str, theta: float, head_dim: int) -> dict[str, Any]:
    """Recover llama 3's scaling from its table of divisors; the other three numbers are the same in all its models."""
    info = file.tensors[FACTORS_TENSOR]
    if arch != "llama" or info.type.name != "F32" or info.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{file.path}: tensor {FACTORS_TENSOR!r} is {info.type.name} {info.shape} in a {arch} model; "
            f"F32 ({head_dim // 2},) in a llama model is supported."
        )
    stored = file.raw(info).view("<f4")[0]
    factor = float(stored.max())
    if not np.allclose(stored, _llama3_divisors(theta, head_dim, factor), rtol=1e-3):
        raise CheckpointError(
            f"{file.path}: the rope factors in {FACTORS_TENSOR!r} are not those of llama 3's scaling."
        )
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def _llama3_divisors(theta: float, head_dim: int, factor: float) -> NDArray[np.float64]:
    wavelengths = 2 * pi * theta ** (np.arange(0, head_dim, 2) / head_dim)  # in positions
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = (LLAMA3["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    blend = np.clip(smooth, 0, 1)
    return np.asarray(1 / ((1 - blend) / factor + blend), np.float64)
