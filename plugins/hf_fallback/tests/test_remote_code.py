"""Code that a checkpoint brings along runs only if the user says so, and is served like any other model then."""

import json
import sys

import pytest

from core import LLM
from core.errors import CheckpointError, NoImplementation
from core.testing import assert_matches_transformers, tiny_checkpoint

CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).write_text("imported")


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = -out.logits  # so that a plain Llama gives other answers
        return out
"""


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """A checkpoint whose class is in its own Python file; importing that leaves a marker."""
    from transformers import dynamic_module_utils

    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds the folder above
    folder = tiny_checkpoint("llama", tmp_path / "odd")
    (folder / "modeling_odd.py").write_text(CODE.format(marker=str(folder / "marker")))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "odd", "architectures": ["OddForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def test_without_the_flag_nothing_is_imported_and_the_error_names_the_files(odd):
    with pytest.raises(NoImplementation, match=r"modeling_odd\.py.*--trust-remote-code"):
        LLM(model=str(odd), skip_tokenizer_init=True)
    assert not (odd / "marker").exists()


def test_with_the_flag_its_own_class_serves(odd):
    assert assert_matches_transformers(odd, trust_remote_code=True, max_tokens=5) == "transformers/paged"
    assert (odd / "marker").exists()


def test_a_broken_file_is_an_error_that_quotes_it(odd):
    (odd / "modeling_odd.py").write_text("import a_module_that_nobody_has\n")
    with pytest.raises(CheckpointError, match="a_module_that_nobody_has"):
        LLM(model=str(odd), skip_tokenizer_init=True, trust_remote_code=True)
