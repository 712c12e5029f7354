"""int8 and int4 on the fly: any model answers as its rounded weights do, and takes no more memory than them."""

import pytest
import torch

from core.config import EngineConfig
from core.engine_build import build_engine
from core.layers import AffineTensor, QuantizedTensor
from core.testing import assert_matches_dequantized, tiny_checkpoint
from core_quant_int.method import IntMethod, group_size_of


@pytest.mark.parametrize(("bits", "steps"), [(8, 127), (4, 7.5)])
def test_a_weight_is_off_by_half_a_step_at_most(bits, steps):
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    weight[3, 128:] = 0
    found = IntMethod(bits).quantize("q_proj.weight", weight)
    assert isinstance(found, AffineTensor)
    largest = weight.unflatten(-1, (2, 128)).abs().amax(-1, keepdim=True)
    error = (found.dequantize() - weight).unflatten(-1, (2, 128)).abs()
    assert bool((error <= largest / steps / 2 * 1.5 + 1e-7).all())
    assert torch.equal(found.dequantize()[3, 128:], torch.zeros(128))
    assert found.num_bytes < weight.numel() * (1.1 if bits == 8 else 0.6)


def test_groups_divide_the_row():
    assert [group_size_of(size) for size in (4096, 576, 192, 48, 131)] == [128, 96, 96, 48, 1]


def test_small_weights_stay_in_floats():
    for shape in ((8, 256), (64, 131)):
        weight = torch.randn(shape)
        assert IntMethod(8).quantize("gate.weight", weight) is weight


def test_experts_are_rounded_as_a_stack():
    weight = torch.randn(3, 32, 64)
    stack = IntMethod(4).quantize("experts.down_proj", weight)
    assert torch.equal(stack.dequantize()[1], IntMethod(4).quantize("down_proj", weight[1]).dequantize())


@pytest.mark.parametrize(
    ("quantization", "model_type", "model_impl", "served_by"),
    [
        ("int8", "llama", "native", "native_llama"),
        ("int4", "llama", "native", "native_llama"),
        ("int8", "llama", "transformers", "transformers/paged"),
        ("int4", "qwen3_moe", "transformers", "transformers/paged"),
        ("int8", "mamba", "transformers", "transformers/rows"),
        ("int4", "gpt2", "transformers", "transformers/paged"),
        ("int8", "gpt_oss", "transformers", "transformers/paged"),
        ("int4", "llama4_text", "transformers", "transformers/rows (texts of one length together)"),
    ],
)
def test_a_model_answers_as_its_rounded_weights_do(tmp_path, quantization, model_type, model_impl, served_by):
    folder = tiny_checkpoint(model_type, tmp_path)
    assert assert_matches_dequantized(folder, model_impl, quantization=quantization) == served_by


@pytest.mark.parametrize("model_impl", ["native", "transformers"])
def test_linears_are_small_and_the_rest_stays_in_floats(tmp_path, model_impl):
    folder = tiny_checkpoint("llama", tmp_path)
    engine = build_engine(EngineConfig(str(folder), model_impl, quantization="int4", skip_tokenizer_init=True))
    model = getattr(engine.model, "module", engine.model)
    quantized = {name for name, weight in model.named_parameters() if isinstance(weight, QuantizedTensor)}
    engine.close()
    assert quantized
    assert not [name for name in quantized if "embed" in name or "norm" in name or "head" in name]
