"""Real files: smollm2's, which a package carries, and whatever CORE_TEST_GGUF names (paths, divided as PATH is)."""

import os
from pathlib import Path

import gguf
import pytest
import torch

from core.layers import QuantizedTensor
from core.testing import assert_matches_dequantized
from core_gguf.checkpoint import GGUFCheckpoint

pytestmark = pytest.mark.slow
MORE = [Path(name) for name in os.environ.get("CORE_TEST_GGUF", "").split(os.pathsep) if name]


@pytest.fixture(params=["smollm2", *MORE], ids=lambda path: Path(path).name)
def real_file(request, smollm2_path):
    return smollm2_path if request.param == "smollm2" else request.param


def test_every_block_decodes_to_the_bits_of_the_gguf_package(real_file):
    checkpoint = GGUFCheckpoint.open(real_file)
    for name, tensor in checkpoint.quantized_tensors(torch.float32):
        raw = checkpoint.raw(name)
        wanted = gguf.quants.dequantize(raw.data.numpy(), gguf.GGMLQuantizationType(raw.type.id)).reshape(raw.shape)
        got = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
        assert torch.equal(got, torch.from_numpy(wanted) - raw.minus), name


def test_it_answers_like_its_decoded_weights_by_the_fallback(real_file):
    assert assert_matches_dequantized(real_file, "transformers", max_tokens=6) == "transformers/paged"


def test_smollm2_answers_like_its_decoded_weights_natively(smollm2_path):
    assert_matches_dequantized(smollm2_path, "native_llama", max_tokens=6)
