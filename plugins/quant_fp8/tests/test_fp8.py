"""FP8 checkpoints stand for the floats that transformers dequantizes them to, stay bytes, and are served."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.config import EngineConfig
from core.errors import CheckpointError, ConfigError
from core.layers import Float8Tensor
from core.plugins import PluginHost
from core.testing import assert_matches_dequantized, tiny_checkpoint

E4M3 = torch.float8_e4m3fn


def blocked(weight, block):
    """Values in float8 and a scale for each block, as DeepSeek's checkpoints have them."""
    rows, columns = (-(-size // one) for size, one in zip(weight.shape, block, strict=True))
    scales = torch.empty(rows, columns)
    values = torch.empty(weight.shape, dtype=E4M3)
    for i in range(rows):
        for j in range(columns):
            at = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[at].abs().max() / 448
            values[at] = (weight[at] / scales[i, j]).to(E4M3)
    return values, scales


def written(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def read(folder, dtype=torch.float32):
    options = EngineConfig(model=str(folder))
    host = PluginHost.load()
    checkpoint = host.open_checkpoint(str(folder), options)
    return dict(host.quant_method(checkpoint.spec, options).tensors(checkpoint, dtype))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_block_scales_give_what_transformers_dequantizes(scale_dtype, tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    values, scales = blocked(torch.randn(48, 64), (16, 32))
    scales = scales.to(scale_dtype)
    tensors = {"a.weight": values, "a.weight_scale_inv": scales, "norm.weight": torch.ones(4)}
    found = read(written(tmp_path / "m", tensors, quant_method="fp8", weight_block_size=[16, 32]))
    assert set(found) == {"a.weight", "norm.weight"}
    weight = found["a.weight"]
    assert isinstance(weight, Float8Tensor)
    assert weight.parts["codes"].dtype == torch.uint8
    theirs = Fp8Dequantize(None)._dequantize_one(values, scales, torch.float32)
    assert torch.equal(weight.dequantize(), theirs)


def test_a_last_block_may_be_shorter_and_experts_have_scales_of_their_own(tmp_path):
    experts = [blocked(torch.randn(40, 72), (16, 32)) for _ in range(3)]
    tensors = {"e": torch.stack([v for v, _ in experts]), "e_scale_inv": torch.stack([s for _, s in experts])}
    weight = read(written(tmp_path / "m", tensors, quant_method="fp8", weight_block_size=[16, 32]))["e"]
    values, scales = experts[1]
    spread = scales.repeat_interleave(16, 0)[:40].repeat_interleave(32, 1)[:, :72]
    assert torch.equal(weight[1].dequantize(), values.float() * spread)


def test_a_scale_a_tensor_and_a_scale_a_row(tmp_path):
    values = torch.randn(8, 16).to(E4M3)
    one = {"a.weight": values, "a.weight_scale_inv": torch.tensor(0.5), "a.activation_scale": torch.tensor(2.0)}
    found = read(written(tmp_path / "one", one, quant_method="fp8", weight_block_size=None))
    assert set(found) == {"a.weight"}
    assert torch.equal(found["a.weight"].dequantize(), values.float() * 0.5)
    rows = torch.rand(8, 1)
    each = {"a.weight": values, "a.weight_scale": rows}
    found = read(written(tmp_path / "rows", each, quant_method="fbgemm_fp8"), torch.bfloat16)
    assert torch.equal(found["a.weight"].dequantize(), (values.float() * rows).bfloat16())


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ({"a.weight": torch.zeros(4, 4).to(E4M3)}, r"'a\.weight_scale_inv' is missing. .*model\.safetensors needs it"),
        (
            {"a.weight_scale_inv": torch.ones(1, 1)},
            r"'a\.weight_scale_inv' of .* is the scale of a weight",
        ),
        (
            {"a.weight": torch.zeros(4, 4).to(E4M3), "a.weight_scale_inv": torch.ones(3, 1)},
            r"'a\.weight_scale_inv' of .*model\.safetensors has shape \[3, 1\]; .* is \[1, 1\]",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_file_and_tensor(tensors, error, tmp_path):
    with pytest.raises(CheckpointError, match=error):
        read(written(tmp_path / "m", tensors, quant_method="fp8", weight_block_size=[128, 128]))


def test_a_truncated_file_is_an_error_that_names_it_and_the_tensor(tmp_path):
    tensors = {"a.weight": torch.zeros(4, 4).to(E4M3), "a.weight_scale_inv": torch.ones(1, 1)}
    folder = written(tmp_path / "m", tensors, quant_method="fp8", weight_block_size=[128, 128])
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short .* before tensor 'a\.\w+' does"):
        read(folder)


def test_experts_in_four_bits_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="experts in 'fp4'"):
        read(written(tmp_path / "m", {"a": torch.zeros(1)}, quant_method="fp8", expert_dtype="fp4"))


@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_a_model_is_served_like_its_floats(impl, tmp_path):
    folder = tiny_checkpoint("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = blocked(tensors[name], (16, 32))
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [16, 32],
        "activation_scheme": "dynamic",
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert_matches_dequantized(folder, impl)
