"""Formats that only transformers reads: its own quantized layers are served; a missing library is named."""

import json

import pytest
import torch

from core import LLM
from core.config import EngineConfig
from core.errors import CheckpointError, ConfigError
from core.plugins import PluginHost
from core.testing import answers_of, assert_serves, default_prompts, tight_options, tiny_checkpoint


def marked(folder, **stated):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    return folder


def test_a_missing_library_is_named(tmp_path):
    folder = marked(
        tiny_checkpoint("llama", tmp_path), quant_method="vptq", config_for_layers={}, shared_layer_config={}
    )
    with pytest.raises(CheckpointError, match=r"pip install (accelerate|-U vptq)"):
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
