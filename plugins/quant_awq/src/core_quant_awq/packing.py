"""AWQ's three packings of 4-bit codes, brought into core's: [out, in / 2] uint8, an even weight in the low half.

gemm        qweight int32 [in, out / 8]: nibble i of a word is the row ORDER[i] of eight neighbouring rows;
            qzeros likewise [groups, out / 8]; scales [groups, out]
gemv        qweight int32 [out, in / 8], nibbles in order; qzeros [out, width]; scales [out, 8 * width]; the first
            `groups` of them are used
gemv_fast   qweight int16 [out / 4, in]: four rows interleaved, columns shuffled within 32; instead of zeros there are
            offsets -scale * zero; scales and offsets [8 * width, out], the first `groups` of them used

Int32 and int16 are read as bytes, so this needs a little-endian machine, like the format itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.layers import pack_codes, unpack_codes

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def rows_of_gemm(words: Tensor) -> Tensor:
    """Int32 [n, out / 8] -> codes uint8 [n, out], one each."""
    octets = unpack_codes(words.contiguous().view(torch.uint8), 4).unflatten(-1, (-1, 8))
    found = torch.empty_like(octets)
    for nibble, row in enumerate(ORDER):
        found[..., row] = octets[..., nibble]
    return found.flatten(-2)


def codes_of_gemm(qweight: Tensor) -> Tensor:
    """Int32 [in, out / 8] -> packed codes [out, in / 2]."""
    return pack_codes(rows_of_gemm(qweight).t().contiguous(), 4)


def codes_of_gemv(qweight: Tensor) -> Tensor:
    """Int32 [out, in / 8] -> packed codes [out, in / 2]: the same bytes."""
    return qweight.contiguous().view(torch.uint8)


def zeros_of_gemv(qzeros: Tensor, groups: int) -> Tensor:
    """Int32 [out, width] -> uint8 [out, groups]."""
    return unpack_codes(qzeros.contiguous().view(torch.uint8), 4)[:, :groups].contiguous()


def codes_of_gemv_fast(qweight: Tensor) -> Tensor:
    """Int16 [out / 4, in] -> packed codes [out, in / 2]; undoes, step by step, how it was packed."""
    quarter, columns = qweight.shape
    nibbles = unpack_codes(qweight.contiguous().view(torch.uint8), 4)  # [out / 4, in * 4]
    rows = nibbles.view(quarter, columns // 64, 4, 64).transpose(1, 2).reshape(quarter * 4, columns)
    eights = rows.view(-1, 4, 2, 4).transpose(2, 3)  # of 32 columns: 4 times 8, of which even ones came first
    return pack_codes(eights.reshape(-1, 4, 4, 2).transpose(1, 2).reshape(quarter * 4, columns), 4)


def words_of_rows(codes: Tensor) -> Tensor:
    """Codes [n, out], each below 16 -> int32 [n, out / 8]: the inverse of rows_of_gemm."""
    eights = codes.to(torch.uint8).unflatten(-1, (-1, 8))[..., list(ORDER)]
    return pack_codes(eights.flatten(-2), 4).contiguous().view(torch.int32)
