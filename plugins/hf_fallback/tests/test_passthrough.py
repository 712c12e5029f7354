"""Formats that only transformers reads: its own quantized layers are served; a missing library is named."""

import json

import pytest
import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from core import LLM
from core.config import EngineConfig
from core.errors import CheckpointError, ConfigError
from core.plugins import PluginHost
from core.testing import (
    answers_of,
    assert_matches_transformers,
    assert_serves,
    default_prompts,
    packed_checkpoint,
    tight_options,
    tiny_checkpoint,
)


def marked(folder, **stated):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    return folder


def test_a_missing_library_is_named(tmp_path):
    folder = marked(
        tiny_checkpoint("llama", tmp_path), quant_method="vptq", config_for_layers={}, shared_layer_config={}
    )
    with pytest.raises(CheckpointError, match=r"quantized with 'vptq', .*pip install vptq"):
        LLM(model=str(folder), **tight_options("auto"))


def test_native_leaves_such_a_model_to_transformers(tmp_path):
    folder = marked(tiny_checkpoint("llama", tmp_path), quant_method="torchao", quant_type={})
    options = EngineConfig(model=str(folder))
    host = PluginHost.load()
    checkpoint = host.open_checkpoint(str(folder), options)
    method = host.quant_method(checkpoint.spec, options)
    assert method.by_transformers
    with pytest.raises(ConfigError, match="only transformers reads"):
        list(method.tensors(checkpoint, torch.float32))


def test_formats_that_have_a_plugin_are_left_to_it(tmp_path):
    folder = marked(tiny_checkpoint("llama", tmp_path), quant_method="awq", bits=4, group_size=16)
    options = EngineConfig(model=str(folder))
    installed = {plugin.name for plugin in PluginHost.load().plugins}
    host = PluginHost.load(disable=sorted(installed & {"quant_awq"}))
    with pytest.raises(ConfigError, match="pip install core-serve-quant-awq"):
        host.quant_method(host.open_checkpoint(str(folder), options).spec, options)


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_torchaos_layers_are_served_as_transformers_runs_them(tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    source, out = tiny_checkpoint("llama", tmp_path / "source"), tmp_path / "out"
    quantization = TorchAoConfig(Int8WeightOnlyConfig())
    options = {"dtype": torch.float32, "device_map": "cpu"}
    AutoModelForCausalLM.from_pretrained(source, quantization_config=quantization, **options).save_pretrained(out)
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    plain.generation_config.eos_token_id = None
    wanted = answers_of(plain, default_prompts(), 8)
    with LLM(model=str(out), **tight_options("auto")) as llm:
        assert_serves(llm, default_prompts(), wanted, 2e-3)
        assert llm.model_impl_name.startswith("transformers/")


def mxfp8(name, weight):
    """Groups of 32 weights in float8, and the power of two that each is multiplied with."""
    if weight.dim() != 2 or "embed" in name or "lm_head" in name:
        return None
    groups = weight.unflatten(1, (-1, 32))
    exponent = groups.abs().amax(-1).log2().floor() - 8
    values = (groups / exponent.exp2()[..., None]).flatten(1).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale_inv": (exponent + 127).to(torch.uint8)}


def bitnet(name, weight):
    """-1, 0 and 1, four to a byte."""
    if weight.dim() != 2 or "embed" in name or "lm_head" in name:
        return None
    scale = weight.abs().mean()
    quarters = ((weight / scale).round().clamp(-1, 1) + 1).to(torch.uint8).unflatten(0, (4, -1))
    packed = sum(quarter << 2 * place for place, quarter in enumerate(quarters))
    return {"weight": packed, "weight_scale": scale.reshape(1)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of what transformers uses
@pytest.mark.parametrize(
    ("pack", "stated"), [(mxfp8, {"weight_block_size": [1, 32]}), (bitnet, {})], ids=["mxfp8", "bitnet"]
)
def test_formats_that_transformers_reads_by_itself_are_served_as_it_reads_them(pack, stated, tmp_path):
    pytest.importorskip("accelerate")
    if pack.__name__ not in AUTO_QUANTIZER_MAPPING:
        pytest.skip("this transformers does not know the format")
    source = tiny_checkpoint("llama", tmp_path / "source", num_hidden_layers=1, hidden_size=64, intermediate_size=64)
    out = packed_checkpoint(source, tmp_path / "out", {"quant_method": pack.__name__, **stated}, pack)
    with torch.compiler.set_stance("force_eager"):  # what transformers compiles for bitnet takes a minute
        assert assert_matches_transformers(out).startswith("transformers/")
