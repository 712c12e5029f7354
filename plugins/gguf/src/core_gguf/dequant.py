"""Blocks of quantized numbers -> float32, for each ggml type. Knows bytes only, no names and no files.

Each decoder takes blocks [n, block_bytes] uint8 and returns [n, block_elements] float32. The order of the float
operations is ggml's own (scale, multiply, then add), so the results are equal bit for bit. On a CPU blocks go through
in chunks that fit in the cache, and that torch does not divide among threads: waiting for each other after every one of
these short operations, threads on a busy machine take a hundred times longer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from core_gguf.ggml_types import GGMLType

CHUNK_ELEMENTS = 31 << 10  # below 32,768, from where torch takes several threads
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of IQ4_NL and IQ4_XS


def _halves(blocks: Tensor, start: int) -> Tensor:
    """Read the float16 at byte `start` of every block: [n, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _fields(packed: Tensor, group: int, bits: int) -> Tensor:
    """Unpack numbers of 1, 2 or 4 bits: of every `group` bytes all lowest fields, then all next ones, and so on."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    rows = packed.unflatten(1, (-1, 1, group)) >> shifts[:, None]
    return rows.bitwise_and_((1 << bits) - 1).flatten(1)


def _nibbles(packed: Tensor, group: int) -> Tensor:
    rows = packed.unflatten(1, (-1, group))
    return torch.stack([rows & 15, rows >> 4], 2).flatten(1)


def _signed(numbers: Tensor, middle: int) -> Tensor:
    return numbers.view(torch.int8).sub_(middle)


def _q4_0(blocks: Tensor) -> Tensor:
    return _signed(_nibbles(blocks[:, 2:], 16), 8) * _halves(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 4:], 16) * _halves(blocks, 0)).add_(_halves(blocks, 2))


def _five_bits(blocks: Tensor, high_start: int) -> Tensor:
    """4 bytes with the fifth bits of 32 numbers, then 16 bytes with their low halves: [n, 32]"""
    high = _bits(blocks[:, high_start : high_start + 4]).flatten(1)
    return _nibbles(blocks[:, high_start + 4 :], 16).bitwise_or_(high << 4)


def _bits(packed: Tensor) -> Tensor:
    """uint8 [n, b] -> [n, b, 8], the lowest bit first."""
    return (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)).bitwise_and_(1)


def _q5_0(blocks: Tensor) -> Tensor:
    return _signed(_five_bits(blocks, 2), 16) * _halves(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:
    return (_five_bits(blocks, 4) * _halves(blocks, 0)).add_(_halves(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8) * _halves(blocks, 0)


def _scaled(numbers: Tensor, scales: Tensor) -> Tensor:
    """Multiply each of a block's equal groups with its scale: [n, 256] * [n, groups]."""
    grouped = numbers.unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(2)
    return grouped.flatten(1)


def _scaled_less(numbers: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    grouped = numbers.unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(2)
    return grouped.sub_(minima.unsqueeze(2)).flatten(1)


def _q2_k(blocks: Tensor) -> Tensor:
    # 16 bytes of a 4-bit scale and a 4-bit minimum, 64 bytes of four 2-bit numbers, two float16
    scales, minima = blocks[:, :16] & 15, blocks[:, :16] >> 4
    numbers = _fields(blocks[:, 16:80], 32, 2)
    return _scaled_less(numbers, _halves(blocks, 80) * scales, _halves(blocks, 82) * minima)


def _q3_k(blocks: Tensor) -> Tensor:
    # 32 bytes of top bits (clear: minus 4), 64 bytes of four 2-bit lows, 12 bytes of 6-bit scales, one float16
    numbers = _fields(blocks[:, 32:96], 32, 2) | (_fields(blocks[:, :32], 32, 1) << 2)
    low, high = _fields(blocks[:, 96:104], 8, 4), _fields(blocks[:, 104:108], 4, 2)
    scales = _halves(blocks, 108) * _signed(low | (high << 4), 32)
    return _scaled(_signed(numbers, 4), scales)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack 8 scales and 8 minima of 6 bits each from 12 bytes: two of [n, 8].

    bytes 0-3: scales 0-3 (low 6 bits), top 2 bits of scales 4-7      bytes 4-7: the same for the minima
    bytes 8-11: low 4 bits of scales 4-7 (low half) and of minima 4-7 (high half)
    """
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, (rest & 15) | ((first >> 6) << 4)], 1)
    minima = torch.cat([second & 63, (rest >> 4) | ((second >> 6) << 4)], 1)
    return scales, minima


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    return _scaled_less(_nibbles(blocks[:, 16:], 32), _halves(blocks, 0) * scales, _halves(blocks, 2) * minima)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    numbers = _nibbles(blocks[:, 48:], 32) | (_fields(blocks[:, 16:48], 32, 1) << 4)
    return _scaled_less(numbers, _halves(blocks, 0) * scales, _halves(blocks, 2) * minima)


def _q6_k(blocks: Tensor) -> Tensor:
    # 128 bytes of low halves, 64 bytes of four 2-bit tops, 16 int8 scales, one float16
    numbers = _nibbles(blocks[:, :128], 64) | (_fields(blocks[:, 128:192], 32, 2) << 4)
    return _scaled(_signed(numbers, 32), _halves(blocks, 208) * blocks[:, 192:208].view(torch.int8))


def _iq4_values(packed: Tensor) -> Tensor:
    table = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=packed.device)
    return table[_nibbles(packed, 16).int()]


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _iq4_values(blocks[:, 2:]) * _halves(blocks, 0)


def _iq4_xs(blocks: Tensor) -> Tensor:
    # one float16, 2 bytes of eight 2-bit tops of scales, 4 bytes of their low halves, 128 bytes of numbers
    scales = _fields(blocks[:, 4:8], 1, 4) | (_fields(blocks[:, 2:4], 1, 2) << 4)
    return _scaled(_iq4_values(blocks[:, 8:]), _halves(blocks, 0) * _signed(scales, 32))


def _f32(blocks: Tensor) -> Tensor:
    return blocks.clone(memory_format=torch.contiguous_format).view(torch.float32)


def _f16(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.float16).float()


def _bf16(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.bfloat16).float()


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
SUPPORTED = frozenset(_DECODERS)  # names of the types that `dequantize` takes


def dequantize(raw: Tensor, kind: GGMLType) -> Tensor:
    """Decode rows uint8 [..., row_bytes] of a supported type into new float32 [..., elements]."""
    blocks = raw.reshape(-1, kind.block_bytes)
    decode, step = _DECODERS[kind.name], CHUNK_ELEMENTS // kind.block_elements
    if len(blocks) <= step or raw.device.type != "cpu":
        out = decode(blocks)
    else:
        out = torch.empty(len(blocks), kind.block_elements, device=raw.device)
        for start in range(0, len(blocks), step):
            out[start : start + step] = decode(blocks[start : start + step])
    return out.view(*raw.shape[:-1], -1)
