"""Blocks of quantized numbers -> float32, for each ggml type. Knows bytes only, no names and no files.

Each decoder takes blocks [n, block_bytes] uint8 and fills out [n, block_elements] float32. The order of the float
operations is ggml's own (scale, multiply, then add), so the results are equal bit for bit. Blocks go through in
chunks that fit in the cache: twice as fast as whole tensors at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from core_gguf.ggml_types import GGMLType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
CHUNK_ELEMENTS = 1 << 17  # 512 KiB of float32


def _halves(blocks: Bytes, start: int) -> Floats:
    """Read the float16 at byte `start` of every block: [n, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes, group: int) -> Bytes:
    """Unpack 4-bit numbers: of every `group` bytes first all low halves, then all high ones. [n, b] -> [n, 2 * b]"""
    rows = packed.reshape(len(packed), -1, 1, group)
    out = np.empty((len(packed), rows.shape[1], 2, group), np.uint8)
    np.bitwise_and(rows[:, :, 0], 15, out=out[:, :, 0])
    np.right_shift(rows[:, :, 0], 4, out=out[:, :, 1])
    return out.reshape(len(packed), -1)


def _q4_0(blocks: Bytes, out: Floats) -> None:
    numbers = _nibbles(blocks[:, 2:], 16).view(np.int8)
    np.subtract(numbers, np.int8(8), out=numbers)
    np.multiply(numbers, _halves(blocks, 0), out=out)


def _q4_1(blocks: Bytes, out: Floats) -> None:
    np.multiply(_nibbles(blocks[:, 4:], 16), _halves(blocks, 0), out=out)
    np.add(out, _halves(blocks, 2), out=out)


def _five_bits(blocks: Bytes, high_start: int) -> Bytes:
    """4 bytes with the fifth bits of 32 numbers, then 16 bytes with their low halves: [n, 32]"""
    high = np.unpackbits(blocks[:, high_start : high_start + 4], axis=1, bitorder="little")
    numbers = _nibbles(blocks[:, high_start + 4 :], 16)
    numbers |= high << np.uint8(4)
    return numbers


def _q5_0(blocks: Bytes, out: Floats) -> None:
    numbers = _five_bits(blocks, 2).view(np.int8)
    np.subtract(numbers, np.int8(16), out=numbers)
    np.multiply(numbers, _halves(blocks, 0), out=out)


def _q5_1(blocks: Bytes, out: Floats) -> None:
    np.multiply(_five_bits(blocks, 4), _halves(blocks, 0), out=out)
    np.add(out, _halves(blocks, 2), out=out)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _halves(blocks, 0), out=out)


def _scales_and_mins(packed: Bytes) -> tuple[Floats, Floats]:
    """Unpack 8 scales and 8 minima of 6 bits each from 12 bytes: two of [n, 8].

    bytes 0-3: scales 0-3 (low 6 bits), top 2 bits of scales 4-7      bytes 4-7: the same for the minima
    bytes 8-11: low 4 bits of scales 4-7 (low half) and of minima 4-7 (high half)
    """
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (rest & 15) | ((first >> 6) << 4)], axis=1)
    minima = np.concatenate([second & 63, (rest >> 4) | ((second >> 6) << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _scale_groups(blocks: Bytes, numbers: Bytes, out: Floats) -> None:
    """The tail that Q4_K and Q5_K share: 8 groups of 32 numbers, each with a scale and a minimum."""
    scales, minima = _scales_and_mins(blocks[:, 4:16])
    groups = out.reshape(-1, 8, 32)
    np.multiply(numbers.reshape(-1, 8, 32), (_halves(blocks, 0) * scales)[:, :, None], out=groups)
    np.subtract(groups, (_halves(blocks, 2) * minima)[:, :, None], out=groups)


def _q4_k(blocks: Bytes, out: Floats) -> None:
    _scale_groups(blocks, _nibbles(blocks[:, 16:], 32), out)


def _q5_k(blocks: Bytes, out: Floats) -> None:
    # bit g of byte i is the fifth bit of number i in group g
    high = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little").swapaxes(1, 2).reshape(-1, 256)
    _scale_groups(blocks, np.bitwise_or(_nibbles(blocks[:, 48:], 32), high << np.uint8(4)), out)


def _q6_k(blocks: Bytes, out: Floats) -> None:
    # 128 bytes of low halves, 64 bytes of four 2-bit tops, 16 int8 scales, one float16
    low = _nibbles(blocks[:, :128], 64)
    tops = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    numbers = (low | ((tops & 3) << 4).reshape(-1, 256)).view(np.int8)
    np.subtract(numbers, np.int8(32), out=numbers)
    scales = _halves(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    np.multiply(numbers.reshape(-1, 16, 16), scales[:, :, None], out=out.reshape(-1, 16, 16))


def _f32(blocks: Bytes, out: Floats) -> None:
    out[...] = blocks.view("<f4")


def _f16(blocks: Bytes, out: Floats) -> None:
    out[...] = blocks.view("<f2")


def _bf16(blocks: Bytes, out: Floats) -> None:
    np.left_shift(blocks.view("<u2"), np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)


_DECODERS: dict[str, Callable[[Bytes, Floats], None]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
SUPPORTED = frozenset(_DECODERS)  # names of the types that `dequantize` takes


def dequantize(raw: Bytes, kind: GGMLType) -> Floats:
    """Decode rows [rows, row_bytes] of a supported type into [rows, elements]."""
    blocks = raw.reshape(-1, kind.block_bytes)
    out = np.empty((len(blocks), kind.block_elements), np.float32)
    decode, step = _DECODERS[kind.name], max(1, CHUNK_ELEMENTS // kind.block_elements)
    with np.errstate(all="ignore"):  # a broken scale gives inf or nan, as it does in ggml
        for start in range(0, len(blocks), step):
            decode(blocks[start : start + step], out[start : start + step])
    return out.reshape(len(raw), -1)
