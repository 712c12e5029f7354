"""Decoding is equal, bit for bit, to the gguf package's."""

import gguf
import numpy as np
import pytest

from core_gguf.dequant import CHUNK_ELEMENTS, SUPPORTED, dequantize
from core_gguf.ggml_types import GGML_TYPES

KINDS = [kind for kind in GGML_TYPES.values() if kind.name in SUPPORTED]


def _both(raw, kind):
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind.id))
    return dequantize(raw, kind).view(np.uint32), expected.view(np.uint32)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_random_bytes_decode_to_the_same_bits(kind):
    blocks = 3 if kind.block_elements > 1 else 96
    raw = np.random.default_rng(kind.id).integers(0, 256, (7, blocks * kind.block_bytes), np.uint8)
    got, expected = _both(raw, kind)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_tensor_larger_than_a_chunk_decodes_to_the_same_bits(kind):
    rows = 2 * CHUNK_ELEMENTS // 256 + 1  # the last chunk is short
    raw = np.random.default_rng(0).integers(0, 256, (rows, 256 // kind.block_elements * kind.block_bytes), np.uint8)
    got, expected = _both(raw, kind)
    np.testing.assert_array_equal(got, expected)


def test_the_table_of_types_has_gguf_s_sizes():
    for kind in GGML_TYPES.values():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.block_elements, kind.block_bytes)
        assert gguf.GGMLQuantizationType[kind.name] == kind.id
