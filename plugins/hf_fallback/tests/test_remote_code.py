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


LATE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
    {state}

    def forward(self, input_ids=None, past_key_values=None, **others):
        out = super().forward(input_ids=input_ids, past_key_values=past_key_values, **others)
        before = past_key_values.get_seq_length() - input_ids.shape[1] if past_key_values is not None else 0
        {change}
        return out
"""
TOO_MANY = "out.logits = out.logits * (0.5 if before + input_ids.shape[1] > 20 else 1.0)"
COUNTER = """self.seen = (self.seen if before else 0) + input_ids.shape[1]
        out.logits = out.logits * (1 + self.seen % 5)"""
HIDDEN_COUNTER = """self.hidden.seen = (self.hidden.seen if before else 0) + input_ids.shape[1]
        out.logits = out.logits * (1 + self.hidden.seen % 5)"""


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


@pytest.mark.parametrize(
    ("state", "change"),
    [("", TOO_MANY), ("seen = 0", COUNTER), ("", "out.logits = out.logits.clone()")],
    ids=["another temperature past 20 tokens", "a number in the module", "nothing odd"],
)
def test_what_goes_by_a_count_of_tokens_is_found_and_served_right(odd, state, change):
    (odd / "modeling_odd.py").write_text(LATE.format(state=state, change=change))
    served_by = assert_matches_transformers(odd, "transformers", trust_remote_code=True)
    assert served_by == (
        "transformers/paged" if "clone" in change else "transformers/rows (texts of one length together)"
    )


def test_state_that_cannot_be_found_is_refused(odd):
    state = "hidden = type('Hidden', (), {'seen': 0})()"
    (odd / "modeling_odd.py").write_text(LATE.format(state=state, change=HIDDEN_COUNTER))
    with pytest.raises(NoImplementation, match="transformers/cache: the module keeps state of a request where it is"):
        LLM(model=str(odd), skip_tokenizer_init=True, trust_remote_code=True)


def test_a_forward_that_always_fails_is_an_error_in_its_own_words(odd):
    (odd / "modeling_odd.py").write_text(LATE.format(state="", change="raise TypeError('these words')"))
    with pytest.raises(CheckpointError, match=r"OddForCausalLM itself fails on .* tokens: TypeError: these words"):
        LLM(model=str(odd), skip_tokenizer_init=True, trust_remote_code=True)
