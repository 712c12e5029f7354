"""GPTQ checkpoints: the packings are gptqmodel's bit for bit, models answer as their dequantized weights do."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core import LLM
from core.config import EngineConfig
from core.errors import CheckpointError, ConfigError
from core.layers import AffineTensor, QuantizedTensor
from core.plugins import PluginHost
from core.testing import assert_matches_dequantized, packed_checkpoint, tiny_checkpoint
from core.weights import HFCheckpoint
from core_quant_gptq.method import GptqMethod
from core_quant_gptq.settings import GptqSettings, is_gptq

VECTORS = Path(__file__).with_name("gptqmodel_vectors.safetensors")  # by the packing code of gptqmodel 7.7
SIZES = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 16}
LINEARS = tuple(f"{part}_proj.weight" for part in ("q", "k", "v", "o", "gate", "up", "down"))
EXPERTS = ("w1.weight", "w2.weight", "w3.weight")


def words(codes, bits):
    """Codes [n, m * 32 / bits] -> int32 [n, m], the first in the lowest bits."""
    shifted = codes.long().unflatten(-1, (-1, 32 // bits)) << torch.arange(0, 32, bits)
    return shifted.sum(-1).to(torch.int32)


def packed(weight, bits, group_size, index, symmetric, version):
    """Round a weight [out, in] whose column j is in group index[j]."""
    most, groups = (1 << bits) - 1, int(index.max()) + 1
    scales, zeros = torch.empty(groups, len(weight)), torch.full((groups, len(weight)), float(1 << (bits - 1)))
    for group in range(groups):
        columns = weight[:, index == group]
        high, low = columns.amax(1).clamp(min=0), columns.amin(1).clamp(max=0)
        scales[group] = ((2 * torch.maximum(high, -low) if symmetric else high - low) / most).half().float()
        if not symmetric:
            zeros[group] = torch.round(-low / scales[group]).clamp(1, most)
    codes = (torch.round(weight.t() / scales[index]) + zeros[index]).clamp(0, most)
    return {
        "qweight": words(codes.t(), bits).t().contiguous(),
        "qzeros": words(zeros - (1 if version == 1 else 0), bits),
        "scales": scales.half(),
        "g_idx": index.to(torch.int32),
    }


def gptq_checkpoint(folder, source, bits=4, group_size=32, desc_act=False, symmetric=True, version=1, **more):
    def pack(name, weight):
        if not name.endswith((*LINEARS, *EXPERTS)):
            return None
        columns = weight.shape[1]
        index = torch.arange(columns) // (columns if group_size == -1 else group_size)
        if desc_act:
            seed = len(name) + sum(map(int, re.findall(r"experts\.(\d+)", name)))  # each expert has its own
            index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(seed))]
        parts = packed(weight, bits, group_size, index, symmetric, version)
        if "q_proj" in name:
            parts["bias"] = torch.zeros(len(weight))  # as old versions of AutoGPTQ store for every linear
        return parts

    stated = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": desc_act, "sym": symmetric}
    stated["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    return packed_checkpoint(source, folder, {**stated, **more}, pack)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"), **SIZES)


@pytest.fixture(scope="module")
def gptq_llama(tmp_path_factory, llama):
    return gptq_checkpoint(tmp_path_factory.mktemp("gptq"), llama)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["sym", "asym", "order"])
def test_dequantized_weights_are_gptqmodels_bit_for_bit(tmp_path, kind, bits, version):
    """With 160 columns in groups of 64, so that the last group is smaller."""
    name, vectors = f"{kind}{bits}", load_file(VECTORS)
    tensors = {f"q.{part}": vectors[f"{name}.{part}"] for part in ("qweight", "scales", "g_idx")}
    save_file(tensors | {"q.qzeros": vectors[f"{name}.v{version}.qzeros"]}, tmp_path / "model.safetensors")
    stated = {"quant_method": "gptq", "bits": bits, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": stated}))
    method = PluginHost.load().quant_method(HFCheckpoint(tmp_path).spec, EngineConfig())
    weight = dict(method.tensors(HFCheckpoint(tmp_path), torch.float16))["q.weight"]
    assert isinstance(weight, AffineTensor)
    assert torch.equal(weight.dequantize(), vectors[f"{name}.dequantized"])


@pytest.mark.parametrize(
    "options",
    [{"bits": 8}, {"desc_act": True}, {"symmetric": False, "version": 2}, {"group_size": -1}],
    ids=["8 bit", "act-order", "asymmetric, v2", "a row one group"],
)
def test_a_llama_answers_as_its_dequantized_weights_do(tmp_path, llama, options):
    assert assert_matches_dequantized(gptq_checkpoint(tmp_path, llama, **options)) == "native_llama"


def test_the_fallback_serves_it_with_the_same_tokens(gptq_llama):
    assert assert_matches_dequantized(gptq_llama, "transformers") == "transformers/paged"


@pytest.mark.parametrize(("model_type", "served_by"), [("mixtral", "paged"), ("qwen3_5_text", "rows")])
def test_experts_and_models_with_state_answer_as_their_dequantized_weights_do(tmp_path, model_type, served_by):
    source = tiny_checkpoint(model_type, tmp_path / "floats", **SIZES)
    folder = gptq_checkpoint(tmp_path / "gptq", source, desc_act=True)
    assert assert_matches_dequantized(folder) == f"transformers/{served_by}"


def test_experts_with_an_order_of_their_own_stay_small(tmp_path):
    source = tiny_checkpoint("mixtral", tmp_path / "floats", **SIZES)
    folder = gptq_checkpoint(tmp_path / "gptq", source, desc_act=True)
    with LLM(model=str(folder), model_impl="transformers", skip_tokenizer_init=True, dtype="float32") as llm:
        experts = llm._engine.model.module.model.layers[0].mlp.experts
        assert experts.gate_up_proj.settings["order"].dim() == 2
        assert all(isinstance(weight, QuantizedTensor) for weight in experts.parameters())


def test_auto_rounds_checkpoints_in_these_packings_are_taken():
    stated = {"quant_method": "auto-round", "bits": 4, "sym": True}
    assert GptqSettings.of({**stated, "packing_format": "auto_round:auto_gptq"}, "/m").zero_offset == 1
    assert not is_gptq({**stated, "packing_format": "auto_round:auto_awq"})


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{NAME}.scales"), f"'{NAME}.scales' is missing.*model.safetensors"),
        (
            lambda tensors: tensors.update({f"{NAME}.qzeros": torch.zeros(2, 8, dtype=torch.int32)}),
            rf"'{NAME}.qzeros' of .*model.safetensors has shape \[2, 8\]; right is \[2, 16\]",
        ),
        (
            lambda tensors: tensors.update({f"{NAME}.g_idx": torch.full((64,), 2, dtype=torch.int32)}),
            rf"'{NAME}.g_idx' of .*model.safetensors names groups outside \[0, 2\)",
        ),
        (
            lambda tensors: tensors.update({f"{NAME}.qweight": torch.zeros(9, 128, dtype=torch.int32)}),
            rf"'{NAME}.qweight' of .*model.safetensors \[9, 128\] does not hold 4 or 8 bits for the 64 columns",
        ),
    ],
)
def test_a_corrupt_checkpoint_is_an_error_that_names_file_and_tensor(tmp_path, gptq_llama, change, message):
    tensors = load_file(gptq_llama / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((gptq_llama / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        list(GptqMethod(GptqSettings(4, 1)).tensors(HFCheckpoint(tmp_path), torch.float32))


def test_a_truncated_file_is_an_error_that_names_it_and_the_tensor(tmp_path, gptq_llama):
    data = (gptq_llama / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-40])
    (tmp_path / "config.json").write_text((gptq_llama / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short .* before tensor '[\w.]+' does"):
        list(GptqMethod(GptqSettings(4, 1)).tensors(HFCheckpoint(tmp_path), torch.float32))


@pytest.mark.parametrize(
    ("stated", "message"), [({"bits": 3}, "with 3 bits"), ({"bits": 4, "format": "marlin"}, "of format 'marlin'")]
)
def test_what_is_not_supported_is_named(stated, message):
    with pytest.raises(ConfigError, match=message):
        GptqSettings.of({"quant_method": "gptq", **stated}, "/models/m")
