"""The kernels that layers are offered give what torch's operators give, and whole quantized models run on them."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near
from torch import nn

from core import LLM, SamplingParams
from core.kernels.provided import Norm, Product, TritonKernels
from core.layers import (
    AffineTensor,
    GatedMLP,
    QuantizedLinear,
    RMSNorm,
    Rotary,
    TableTensor,
    float8_tensor,
    take_kernels,
)
from core.testing import tiny_checkpoint

NF4 = tuple(torch.linspace(-1, 1, 16).tolist())


def numbers(*shape, high=256):
    return torch.randint(0, high, shape, dtype=torch.uint8)


def affine(bits, group, size=128, **settings):
    extra = settings.pop("extra", None)
    parts = {"codes": numbers(40, size * bits // 8), "scales": torch.rand(40, size // group) / 8}
    if extra == "zeros":
        parts["zeros"] = numbers(40, size // group, high=2**bits)
    if extra == "offsets":
        parts["offsets"] = torch.randn(40, size // group).half()
    return AffineTensor(parts, size, torch.float32, bits=bits, group_size=group, order=None, **settings)


def in_order():
    weight = affine(4, 32, extra="zeros")
    weight.settings["order"] = torch.randperm(128)
    return weight


def table():
    parts = {"codes": numbers(40, 64), "scales": torch.rand(40, 2).bfloat16()}
    return TableTensor(parts, 128, torch.float32, group_size=64, table=NF4)


def float8(format, block):
    values = torch.randn(40, 100).to(getattr(torch, format))
    scales = torch.rand(1, 1) if block is None else torch.rand(2, 2)
    return float8_tensor(values, scales, block, torch.float32)


WEIGHTS = {
    "4 bits": lambda: affine(4, 32, extra="zeros"),
    "4 bits around 8": lambda: affine(4, 128),
    "act-order": in_order,
    "8 bits": lambda: affine(8, 64, extra="offsets"),
    "8 bits around 128": lambda: affine(8, 128),
    "table": table,
    "float8 in blocks": lambda: float8("float8_e4m3fn", (32, 64)),
    "float8 of the other kind": lambda: float8("float8_e5m2", None),
}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_product_with_a_quantized_weight(name, dtype, device):
    weight = WEIGHTS[name]().as_dtype(dtype).to(device)
    x, bias = torch.randn(2, 3, weight.shape[1], device=device).to(dtype), torch.randn(40, device=device).to(dtype)
    found = TritonKernels().linear(weight, bias)(x)
    assert found.dtype == dtype and found.shape == (2, 3, 40)
    assert_near(found, F.linear(x.double(), weight.dequantize().double(), bias.double()), dtype)


def test_what_has_no_kernel_is_left_to_torch(device):
    kernels = TritonKernels()
    assert kernels.linear(torch.randn(8, 8, device=device), None) is None
    assert kernels.linear(affine(4, 16).to(device), None) is None  # groups of 16
    assert kernels.gate("relu", torch.float32) is None
    assert kernels.rms_norm(torch.ones(8, device=device, dtype=torch.float16), 1e-5, torch.bfloat16) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_give_the_same_with_kernels_and_without(dtype, device):
    layers = nn.ModuleDict({"norm": RMSNorm(48, 1e-5, dtype), "mlp": GatedMLP(48, 40, False, dtype)}).to(device)
    rotary = layers["rotary"] = Rotary(16, 64, {"rope_type": "default"}, torch.device(device))
    for parameter in layers.parameters():
        parameter.data.normal_()
    x, residual = (torch.randn(5, 48, device=device).to(dtype) for _ in range(2))
    heads = torch.randn(5, 96, device=device).to(dtype)[:, 32:80].unflatten(1, (3, 16))
    angles = torch.cat([torch.randn(5, 1, 8, device=device)] * 2, -1)
    rotation = angles.cos().to(dtype), angles.sin().to(dtype)

    def run():
        summed = residual.clone()
        return [
            layers["norm"](x), layers["norm"].add(x, summed), summed, layers["mlp"](x),
            rotary.rotate(heads.clone(), rotation),
        ]  # fmt: skip

    wanted = run()
    take_kernels(layers, TritonKernels())
    for found, plain in zip(run(), wanted, strict=True):
        assert found.dtype == dtype
        assert_near(found, plain, dtype)
        if dtype == torch.bfloat16:  # rounded in the same places: not near, but the same
            assert (found == plain).double().mean() > 0.97


PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]]


def served(folder, attention, **options):
    return LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        attention_backend=attention,
        disable_plugins=("cpu_kernels",),
        max_model_len=64,
        block_size=4,
        kv_cache_memory=2**20,
        **options,
    )


def tokens_of(llm):
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params)
    llm.close()
    return [output.outputs[0].token_ids for output in outputs]


def kernels_of(model):
    module = model if isinstance(model, nn.Module) else model.module
    linears = [part.kernel for part in module.modules() if isinstance(part, QuantizedLinear)]
    norms = [getattr(part, "kernel", getattr(vars(part).get("forward"), "kernel", None)) for part in module.modules()]
    return linears, [norm for norm in norms if isinstance(norm, Norm)]


@pytest.mark.parametrize(
    ("model_type", "impl", "method"),
    [
        ("llama", "native_llama", "int4"),
        pytest.param("gemma2", "transformers", "int8", marks=pytest.mark.slow),
        pytest.param("mixtral", "transformers", "int4", marks=pytest.mark.slow),
    ],
)
def test_a_quantized_model_runs_on_the_kernels(model_type, impl, method, tmp_path):
    folder = tiny_checkpoint(model_type, tmp_path, hidden_size=64, num_hidden_layers=2)
    llm = served(folder, "triton", quantization=method, model_impl=impl)
    linears, norms = kernels_of(llm._engine.runner.model)
    assert linears and all(isinstance(kernel, Product) for kernel in linears)
    assert norms
    assert llm._engine.runner.model.features.captures_decode
    assert tokens_of(llm) == tokens_of(served(folder, "cpu", quantization=method, model_impl=impl))


BLOCKS = ("merged-linears", "rms-norm", "gated-mlp", "attention-block", "decoder-layer")
WITH_EXPERTS = ("merged-linears", "rms-norm", "grouped-experts", "attention-block", "decoder-layer")


@pytest.mark.parametrize(
    ("model_type", "dtype", "patches"),
    [
        pytest.param("mixtral", "float32", WITH_EXPERTS, marks=pytest.mark.slow),
        pytest.param("llama", "bfloat16", BLOCKS, marks=pytest.mark.slow),
        pytest.param("gemma2", "bfloat16", BLOCKS[:-1], marks=pytest.mark.slow),  # 1 + w, rounded once
        pytest.param("qwen3", "float16", BLOCKS, marks=pytest.mark.slow),  # norms by head
        pytest.param(
            "gpt_oss", "float32", WITH_EXPERTS[:3], marks=pytest.mark.slow
        ),  # experts input first, with a bias
    ],
)
def test_a_module_of_transformers_runs_on_the_kernels(model_type, dtype, patches, tmp_path):
    folder = tiny_checkpoint(model_type, tmp_path, num_hidden_layers=2)
    asked = {"model_impl": "transformers", "dtype": dtype}
    llm = served(folder, "triton", **asked)
    assert llm._engine.runner.model.features.patches == (*patches, "child-lookup")
    assert tokens_of(llm) == tokens_of(served(folder, "cpu", disable_patches=patches, **asked))
