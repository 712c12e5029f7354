"""Without one of core-serve's plugins, what only it can do is an error that gives the line to install it."""

import json

import pytest

from core.config import EngineConfig
from core.contracts import QuantizeSettings
from core.errors import CoreError
from core.llm import LLM
from core.plugins import PluginHost
from core.testing import tiny_checkpoint

# By distribution: the plugin's name, and quantization_configs that only it reads.
READS = {
    "core-serve-quant-awq": ("quant_awq", [{"quant_method": "awq", "bits": 4}]),
    "core-serve-quant-gptq": ("quant_gptq", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "auto-round"}]),
    "core-serve-quant-bnb": ("quant_bnb", [{"quant_method": "bitsandbytes"}, {"load_in_4bit": True}]),
    "core-serve-quant-compressed-tensors": ("quant_compressed_tensors", [{"quant_method": "compressed-tensors"}]),
    "core-serve-quant-fp8": ("quant_fp8", [{"quant_method": "fp8"}, {"quant_method": "fbgemm_fp8"}]),
}
ON_THE_FLY = {
    "core-serve-quant-int": ("quant_int", ["int4", "int8"]),
    "core-serve-quant-bnb": ("quant_bnb", ["bitsandbytes-nf4", "bitsandbytes-fp4", "bitsandbytes-int8"]),
}
MAKES = {
    "core-serve-quant-awq": ("quant_awq", ["awq"]),
    "core-serve-quant-gptq": ("quant_gptq", ["gptq"]),
    "core-serve-quant-bnb": ("quant_bnb", ["bnb-nf4", "bnb-int8"]),
    "core-serve-quant-compressed-tensors": ("quant_compressed_tensors", ["int4", "int8"]),
}


def cases(table):
    return [(package, name, one) for package, (name, several) in table.items() for one in several]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("missing"), num_hidden_layers=1)


def serve(model, disable, **options):
    LLM(model=str(model), disable_plugins=disable, skip_tokenizer_init=True, num_blocks=8, **options).close()


@pytest.mark.parametrize(("package", "name", "stated"), cases(READS), ids=str)
def test_a_checkpoint_whose_plugin_is_gone(package, name, stated, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": stated}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CoreError, match=rf"pip install {package}$"):
        serve(tmp_path, (name,))


@pytest.mark.parametrize(("package", "name", "asked"), cases(ON_THE_FLY), ids=str)
def test_quantizing_on_the_fly_whose_plugin_is_gone(package, name, asked, folder):
    with pytest.raises(CoreError, match=rf"pip install {package}$"):
        serve(folder, (name,), quantization=asked)


@pytest.mark.parametrize(("package", "name", "method"), cases(MAKES), ids=str)
def test_making_a_checkpoint_whose_plugin_is_gone(package, name, method):
    with pytest.raises(CoreError, match=rf"pip install {package}$"):
        PluginHost.load(disable=(name,)).quantizer(method, QuantizeSettings())


def test_a_gguf_file_whose_plugin_is_gone(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CoreError, match=r"pip install core-serve-gguf"):
        serve(tmp_path / "model.gguf", ("gguf",))


@pytest.mark.parametrize(
    ("impl", "gone", "package"),
    [
        ("auto", ("hf_fallback", "native_llama"), "core-serve-hf-fallback"),
        ("transformers", ("hf_fallback",), "core-serve-hf-fallback"),
        ("native_llama", ("native_llama",), "core-serve-native-llama"),
    ],
)
def test_a_model_whose_plugin_is_gone(impl, gone, package, folder):
    with pytest.raises(CoreError, match=rf"pip install {package}$"):
        serve(folder, gone, model_impl=impl)


def test_a_format_that_only_transformers_reads_without_the_fallback(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "torchao"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CoreError, match=r"'torchao'.*pip install core-serve-hf-fallback"):
        host = PluginHost.load(disable=("hf_fallback",))
        options = EngineConfig(model=str(tmp_path))
        host.quant_method(host.open_checkpoint(str(tmp_path), options).spec, options)
