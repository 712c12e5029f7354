"""AWQ checkpoints: the packings are AutoAWQ's bit for bit, models answer as their dequantized weights do."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.cli import run
from core.config import EngineConfig
from core.errors import CheckpointError, ConfigError
from core.layers import AffineTensor
from core.plugins import PluginHost
from core.testing import assert_matches_dequantized, packed_checkpoint, tiny_checkpoint
from core.verify import verify
from core.weights import HFCheckpoint
from core_quant_awq.method import AwqMethod
from core_quant_awq.settings import AwqSettings

VECTORS = Path(__file__).with_name("autoawq_vectors.safetensors")  # by the packing code of AutoAWQ 0.2.9
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 16}


def words(codes):
    """Nibbles [n, 8 * m] -> int32 [n, m], the first in the lowest bits."""
    shifted = codes.long().unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)
    return shifted.sum(-1).to(torch.int32)


def padded(rows, group_size, columns):
    """Pad what gemv keeps for each group to whole words."""
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    width = math.ceil(rows.shape[1] / 8 / multiple) * multiple * 8
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))


def rounded(weight, group_size, zero_point=True):
    """Return codes [out, in], scales and zeros [out, groups] of a weight."""
    groups = weight.unflatten(-1, (-1, group_size))
    high, low = groups.amax(-1).clamp(min=0), groups.amin(-1).clamp(max=0)
    if zero_point:
        scales = ((high - low) / 15).half().float()
        zeros = torch.round(-low / scales).clamp(0, 15)
    else:
        scales = (torch.maximum(high, -low) / 7).half().float()
        zeros = torch.full_like(scales, 8)
    codes = (torch.round(groups / scales.unsqueeze(-1)) + zeros.unsqueeze(-1)).clamp(0, 15)
    return codes.flatten(-2), scales, zeros


def gemm(codes, scales, zeros, group_size):
    def shuffled(rows):
        return words(rows.unflatten(-1, (-1, 8))[..., list(ORDER)].flatten(-2))

    return {"qweight": shuffled(codes.t()), "qzeros": shuffled(zeros.t()), "scales": scales.t().half().contiguous()}


def gemv(codes, scales, zeros, group_size):
    zeros, scales = (padded(one, group_size, codes.shape[1]) for one in (zeros, scales))
    return {"qweight": words(codes), "qzeros": words(zeros), "scales": scales.half()}


def gemv_fast(codes, scales, zeros, group_size):
    rows, columns = codes.shape
    mixed = codes.int().view(rows, -1, 4, 4, 2).transpose(2, 3).reshape(rows, -1, 4, 4, 2).transpose(3, 4)
    fours = mixed.reshape(rows // 4, 4, columns // 64, 64).transpose(1, 2).reshape(rows // 4, columns, 4)
    qweight = (fours << torch.arange(0, 16, 4)).sum(-1).to(torch.int16)
    offsets = padded(-(scales * zeros).half(), group_size, columns).t().contiguous()
    return {
        "qweight": qweight,
        "qzeros": offsets,
        "scales": padded(scales.half(), group_size, columns).t().contiguous(),
    }


PACK = {"gemm": gemm, "gemv": gemv, "gemv_fast": gemv_fast, "llm-awq": gemv_fast}


def awq_checkpoint(folder, source, version="gemm", group_size=32, zero_point=True, skip=()):
    def pack(name, weight):
        if not name.endswith(
            (*(f"{part}_proj.weight" for part in ("q", "k", "v", "o", "gate", "up", "down")), *EXPERTS)
        ):
            return None
        if any(part in name for part in skip):
            return None
        size = weight.shape[1] if group_size == -1 else group_size
        parts = PACK[version](*rounded(weight, size, zero_point), size)
        return parts if zero_point else {name: part for name, part in parts.items() if name != "qzeros"}

    stated = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": version, "zero_point": zero_point}
    return packed_checkpoint(source, folder, {**stated, "modules_to_not_convert": list(skip) or None}, pack)


EXPERTS = ("w1.weight", "w2.weight", "w3.weight")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"), **SIZES)


@pytest.fixture(scope="module")
def awq_llama(tmp_path_factory, llama):
    return awq_checkpoint(tmp_path_factory.mktemp("awq"), llama)


def read(folder, name, dtype=torch.float16):
    method = PluginHost.load().quant_method(HFCheckpoint(folder).spec, EngineConfig())
    return dict(method.tensors(HFCheckpoint(folder), dtype))[name]


@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast"])
@pytest.mark.parametrize("group", ["32", "64", "128", "row"])
def test_dequantized_weights_are_autoawqs_bit_for_bit(version, group, tmp_path):
    vectors = load_file(VECTORS)
    parts = {f"q.{part}": vectors[f"{version}.{group}.{part}"] for part in ("qweight", "qzeros", "scales")}
    save_file(parts, tmp_path / "model.safetensors")
    size = -1 if group == "row" else int(group)
    stated = {"quant_method": "awq", "bits": 4, "group_size": size, "version": version, "zero_point": True}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": stated}))
    weight = read(tmp_path, "q.weight")
    wanted = vectors[f"dequantized.{group}"]
    if version == "gemv_fast":  # offsets are rounded to float16: no bit-for-bit, and AutoAWQ has no CPU code to compare
        torch.testing.assert_close(weight.dequantize(), wanted, atol=2e-4, rtol=0)
        assert torch.equal(weight.parts["codes"], codes_of(vectors, group))
    else:
        assert torch.equal(weight.dequantize(), wanted)


def codes_of(vectors, group):
    return vectors[f"gemv.{group}.qweight"].view(torch.uint8)


@pytest.mark.parametrize(
    ("version", "group_size", "zero_point"),
    [("gemm", 32, True), ("gemv", 64, True), ("llm-awq", 32, True), ("gemm", -1, True), ("gemm", 64, False)],
)
def test_a_llama_answers_as_its_dequantized_weights_do(tmp_path, llama, version, group_size, zero_point):
    folder = awq_checkpoint(tmp_path, llama, version, group_size, zero_point)
    assert assert_matches_dequantized(folder) == "native_llama"


def test_the_fallback_serves_it_with_the_same_tokens(awq_llama):
    assert assert_matches_dequantized(awq_llama, "transformers") == "transformers/paged"


@pytest.mark.parametrize(
    ("model_type", "served_by"),
    [
        ("mixtral", "paged"),
        ("qwen3_5_text", "rows"),
        pytest.param("qwen3_moe", "paged", marks=pytest.mark.slow),
    ],
)
def test_experts_and_models_with_state_answer_as_their_dequantized_weights_do(tmp_path, model_type, served_by):
    source = tiny_checkpoint(model_type, tmp_path / "floats", **SIZES)
    folder = awq_checkpoint(tmp_path / "awq", source)
    assert assert_matches_dequantized(folder) == f"transformers/{served_by}"


def test_modules_left_in_floats_stay_so(tmp_path, llama):
    folder = awq_checkpoint(tmp_path, llama, skip=("q_proj", "layers.1.mlp"))
    assert not isinstance(read(folder, "model.layers.0.self_attn.q_proj.weight"), AffineTensor)
    assert isinstance(read(folder, "model.layers.0.self_attn.k_proj.weight"), AffineTensor)
    assert assert_matches_dequantized(folder) == "native_llama"


def test_embeddings_tied_to_the_head_stay_tied(tmp_path):
    source = tiny_checkpoint("llama", tmp_path / "floats", tie_word_embeddings=True, **SIZES)
    folder = awq_checkpoint(tmp_path / "awq", source)
    assert assert_matches_dequantized(folder) == "native_llama"
    assert assert_matches_dequantized(folder, "transformers") == "transformers/paged"


def test_verify_compares_with_the_dequantized_weights(awq_llama):
    report = verify(awq_llama, device="cpu", dtype="float32")
    assert report.passed, report.problems
    assert report.layers


def test_explain_names_the_method(awq_llama, capsys):
    assert run(["explain", str(awq_llama)]) == 0
    assert "quantization: awq" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ refusals


def damaged(folder, tmp_path, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{NAME}.scales"), f"'{NAME}.scales' is missing.*model.safetensors"),
        (lambda tensors: tensors.pop(f"{NAME}.qzeros"), f"'{NAME}.qzeros' is missing.*model.safetensors"),
        (
            lambda tensors: tensors.update({f"{NAME}.scales": torch.zeros(1, 128, dtype=torch.half)}),
            rf"'{NAME}.scales' of .*model.safetensors has shape \[1, 128\]; right is \[2, 128\]",
        ),
        (
            lambda tensors: tensors.update({f"{NAME}.qweight": torch.zeros(64, 16)}),
            rf"'{NAME}.qweight' of .*model.safetensors is torch.float32",
        ),
        (lambda tensors: tensors.update({f"{NAME}.weight": torch.zeros(128, 64)}), f"{NAME} has a weight in floats"),
    ],
)
def test_a_corrupt_checkpoint_is_an_error_that_names_file_and_tensor(tmp_path, awq_llama, change, message):
    folder = damaged(awq_llama, tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        list(AwqMethod(AwqSettings("gemm", 32, True)).tensors(HFCheckpoint(folder), torch.float32))


def test_a_truncated_file_is_an_error_that_names_it(tmp_path, awq_llama):
    data = (awq_llama / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    (tmp_path / "config.json").write_text((awq_llama / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"is cut short .* ends before tensor"):
        list(AwqMethod(AwqSettings("gemm", 32, True)).tensors(HFCheckpoint(tmp_path), torch.float32))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"bits": 3}, "with 3 bits"),
        ({"version": "marlin"}, "of version 'marlin'"),
        ({"group_size": 0}, "group size of 0"),
    ],
)
def test_what_is_not_supported_is_named(stated, message):
    with pytest.raises(ConfigError, match=message):
        AwqSettings.of({"quant_method": "awq", **stated}, "/models/m")
