"""A GGUF file is served in its own blocks, natively and by the fallback, with the tokens of the decoded weights."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from core.config import EngineConfig
from core.engine_build import make_plan
from core.errors import ConfigError
from core.layers import QuantizedTensor
from core.model_loader import build_model
from core.plugins import PluginHost
from core.spec import ModelSpec
from core.testing import assert_matches_dequantized
from core_gguf.blocks import GGMLTensor
from core_gguf.checkpoint import GGUFCheckpoint
from core_gguf.quant_method import choose_method

HALVES = {  # where a block has float16 numbers, and numbers there that give weights of a usual size
    "Q4_0": {0: 0.01}, "Q4_1": {0: 0.01, 2: -0.08}, "Q5_0": {0: 0.006}, "Q5_1": {0: 0.006, 2: -0.1}, "Q8_0": {0: 8e-4},
    "Q2_K": {80: 0.005, 82: 0.01}, "Q3_K": {108: 0.001}, "Q4_K": {0: 3e-4, 2: 0.002}, "Q5_K": {0: 1e-4, 2: 0.002},
    "Q6_K": {208: 4e-5}, "IQ4_NL": {0: 8e-4}, "IQ4_XS": {0: 5e-5},
}  # fmt: skip
SIZE, VOCAB, HEADS, KV_HEADS = 256, 128, 4, 2
LAYER = {
    "attn_q": (SIZE, SIZE), "attn_k": (SIZE // 2, SIZE), "attn_v": (SIZE // 2, SIZE), "attn_output": (SIZE, SIZE),
    "ffn_gate": (SIZE, SIZE), "ffn_up": (SIZE, SIZE), "ffn_down": (SIZE, SIZE),
}  # fmt: skip
NORMS = {
    "llama": ("attn_norm", "ffn_norm"),
    "gemma3": ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"),
}


def _blocks(kind, rows, columns, rng):
    """Random blocks of a type, as the writer takes them."""
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (rows, columns // block[0], block[1]), np.uint8)
    for start, scale in HALVES[kind].items():
        raw[..., start : start + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return raw.reshape(rows, -1), gguf.GGMLQuantizationType[kind]


def _halves(kind, rows, columns, rng):
    values = rng.standard_normal((rows, columns), np.float32) * columns**-0.5
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]), gguf.GGMLQuantizationType[kind]


@pytest.fixture
def quantized_file(write_gguf, metadata_of):
    """Write a model whose matrices are of these types, one after the other; the first is the tied embedding's."""

    def write(arch, kinds):
        rng, remaining = np.random.default_rng(0), list(kinds) * 16

        def matrix(rows, columns):
            kind = remaining.pop(0)
            return (_blocks if kind in HALVES else _halves)(kind, rows, columns, rng)

        tensors = {"token_embd.weight": matrix(VOCAB, SIZE), "output_norm.weight": np.ones(SIZE, np.float32)}
        for layer in range(2):
            tensors |= {f"blk.{layer}.{part}.weight": matrix(*shape) for part, shape in LAYER.items()}
            norms = dict.fromkeys(NORMS[arch], SIZE) | (
                {"attn_q_norm": 64, "attn_k_norm": 64} if arch != "llama" else {}
            )
            for name, size in norms.items():
                tensors[f"blk.{layer}.{name}.weight"] = 1 + rng.standard_normal(size, np.float32) / 4
        sizes = {f"{arch}.embedding_length": SIZE, f"{arch}.feed_forward_length": SIZE}
        heads = {f"{arch}.attention.key_length": 64, f"{arch}.attention.value_length": 64}
        window = {"gemma3.attention.sliding_window": 8, "gemma3.rope.freq_base": 1e6} if arch == "gemma3" else {}
        return write_gguf(metadata_of(arch) | sizes | heads | window, tensors, arch=arch)

    return write


ALL = [*HALVES, "F16", "BF16"]


@pytest.mark.parametrize("impl", ["native_llama", "transformers"])
@pytest.mark.parametrize("kinds", [ALL, ["Q6_K", "Q4_K"]], ids=["every-type", "q4_k_m"])
def test_a_llama_answers_like_its_decoded_weights(quantized_file, kinds, impl):
    assert impl in assert_matches_dequantized(quantized_file("llama", kinds), impl)


def test_a_gemma_answers_like_its_decoded_weights_by_the_fallback(quantized_file):
    served = assert_matches_dequantized(quantized_file("gemma3", ["Q8_0", "Q4_K", "Q6_K", "Q5_0"]), "transformers")
    assert served == "transformers/paged"


def _weights_of(path, impl, **options):
    config = EngineConfig(model=str(path), model_impl=impl, **options)
    host = PluginHost.load()
    plan = make_plan(config, host)
    model, _ = build_model(plan.models.eligible, plan.checkpoint, plan.context)
    module = getattr(model, "module", model)
    return {name: weight for name, weight in module.named_parameters() if weight.dim() > 1}


@pytest.mark.parametrize("impl", ["native_llama", "transformers/paged"])
def test_no_matrix_becomes_floats_nor_does_the_tied_head(quantized_file, impl):
    weights = _weights_of(quantized_file("llama", ["Q4_1", "Q8_0"]), impl)
    assert weights
    assert all(isinstance(weight, QuantizedTensor) for weight in weights.values())


def test_the_cpu_kernels_multiply_with_every_type_as_it_lies(quantized_file):
    kernels = pytest.importorskip("core_cpu_kernels.kernels").CpuKernels()
    x = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(0))
    checkpoint = GGUFCheckpoint.open(quantized_file("llama", ALL))
    for name, weight in checkpoint.quantized_tensors(torch.float32):
        if isinstance(weight, GGMLTensor):
            kernel = kernels.linear(weight, None)
            assert kernel is not None, weight.packing
            exact = weight.linear(x)
            assert (kernel(x) - exact).norm() < 1e-4 * exact.norm(), (name, weight.packing)


def test_gguf_floats_gives_floats(quantized_file):
    path = quantized_file("llama", ["Q4_1"])
    weights = _weights_of(path, "native_llama", quantization="gguf-floats")
    assert weights
    assert not any(isinstance(weight, QuantizedTensor) for weight in weights.values())


def test_blocks_are_the_mapped_file_itself_unless_rows_change_places(quantized_file):
    checkpoint = GGUFCheckpoint.open(quantized_file("llama", ["Q4_K"]))
    tensors = dict(checkpoint.quantized_tensors(torch.float32))
    assert {type(tensor) for name, tensor in tensors.items() if "norm" not in name} == {GGMLTensor}
    start = torch.frombuffer(checkpoint.file.data, dtype=torch.uint8).data_ptr()
    inside = {name for name, tensor in tensors.items() if isinstance(tensor, GGMLTensor) and
              0 <= tensor.parts["blocks"].data_ptr() - start < len(checkpoint.file.data)}  # fmt: skip
    assert {name.split(".")[-2] for name in set(tensors) - inside if "norm" not in name} == {"q_proj", "k_proj"}
    for name, tensor in tensors.items():
        floats = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
        assert torch.equal(floats, checkpoint.tensor(name)), name


def test_halves_of_the_model_s_own_dtype_are_plain(quantized_file):
    checkpoint = GGUFCheckpoint.open(quantized_file("llama", ["F16", "BF16"]))
    kinds = {type(tensor) for name, tensor in checkpoint.quantized_tensors(torch.float16) if "down_proj" in name}
    assert kinds == {torch.Tensor, GGMLTensor}


def test_the_smollm2_file_keeps_its_size(smollm2_path):
    checkpoint = GGUFCheckpoint.open(smollm2_path)
    kept = dict(checkpoint.quantized_tensors(torch.float32))
    small = sum(tensor.num_bytes for tensor in kept.values() if isinstance(tensor, QuantizedTensor))
    assert (
        small + sum(t.nbytes for t in kept.values() if not isinstance(t, QuantizedTensor)) < smollm2_path.stat().st_size
    )
    assert torch.equal(
        kept["model.embed_tokens.weight"][:300].dequantize(), checkpoint.tensor("model.embed_tokens.weight")[:300]
    )


def test_quantization_chooses_the_method():
    spec, other = ModelSpec(Path("m.gguf"), "gguf", {}), ModelSpec(Path("m"), "hf", {})
    assert choose_method(spec, EngineConfig()).name == "gguf"
    assert choose_method(spec, EngineConfig(quantization="gguf-floats")).name == "gguf-floats"
    assert choose_method(spec, EngineConfig(quantization="bitsandbytes-nf4")) is None
    assert choose_method(other, EngineConfig()) is None
    with pytest.raises(ConfigError, match="--quantization gguf is for GGUF files, and m is none"):
        choose_method(other, EngineConfig(quantization="gguf"))
