"""Decoding is equal, bit for bit, to the gguf package's."""

import gguf
import numpy as np
import pytest
import torch

from core_gguf.blocks import GGMLTensor
from core_gguf.dequant import CHUNK_ELEMENTS, SUPPORTED, dequantize
from core_gguf.ggml_types import GGML_TYPES

KINDS = [kind for kind in GGML_TYPES.values() if kind.name in SUPPORTED]


def _expected(raw, kind):
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind.id)))


def _assert_same_bits(got, expected):
    """Which nan a broken scale gives depends on the processor; all other bits do not."""
    assert torch.equal(got.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(got[numbers].view(torch.int32), expected[numbers].view(torch.int32))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_random_bytes_decode_to_the_same_bits(kind):
    blocks = 3 if kind.block_elements > 1 else 96
    raw = np.random.default_rng(kind.id).integers(0, 256, (7, blocks * kind.block_bytes), np.uint8)
    _assert_same_bits(dequantize(torch.from_numpy(raw), kind), _expected(raw, kind))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_tensor_larger_than_a_chunk_decodes_to_the_same_bits(kind):
    rows = 2 * CHUNK_ELEMENTS // 256 + 1  # the last chunk is short
    raw = np.random.default_rng(0).integers(0, 256, (rows, 256 // kind.block_elements * kind.block_bytes), np.uint8)
    _assert_same_bits(dequantize(torch.from_numpy(raw), kind), _expected(raw, kind))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_weight_in_blocks_is_a_weight(kind):
    raw = np.random.default_rng(kind.id).integers(
        0, 64, (2, 6, 256 // kind.block_elements * kind.block_bytes), np.uint8
    )
    weight = GGMLTensor({"blocks": torch.from_numpy(raw)}, 256, torch.float32, kind=kind)
    assert (weight.packing, weight.shape) == (f"ggml:{kind.name}", (2, 6, 256))
    floats = _expected(raw.reshape(12, -1), kind).view(2, 6, 256)
    _assert_same_bits(weight.dequantize(), floats)
    _assert_same_bits(weight[1, 2:5].dequantize(), floats[1, 2:5])


def test_the_table_of_types_has_gguf_s_sizes():
    for kind in GGML_TYPES.values():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.block_elements, kind.block_bytes)
        assert gguf.GGMLQuantizationType[kind.name] == kind.id
