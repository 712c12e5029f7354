"""The module gets exactly the checkpoint's tensors, or an error that names the others; the bids say what is known."""

import json
from pathlib import Path

import pytest

from core import LLM
from core.config import EngineConfig
from core.contracts import Refusal
from core.errors import CheckpointError
from core.spec import ModelSpec
from core.testing import tiny_checkpoint
from core_hf_fallback.bids import bids_for


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from safetensors.torch import load_file

    folder = tiny_checkpoint("gpt2", tmp_path_factory.mktemp("gpt2"))
    return folder, load_file(folder / "model.safetensors")


def load_with(saved, tmp_path, change):
    from safetensors.torch import save_file

    folder, tensors = saved
    changed = dict(tensors)
    change(changed)
    save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    LLM(model=str(tmp_path), model_impl="transformers", skip_tokenizer_init=True).close()


BIAS = "transformer.h.1.attn.c_proj.bias"


def test_a_missing_tensor_is_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match=f"missing keys: .*{BIAS}"):
        load_with(saved, tmp_path, lambda tensors: tensors.pop(BIAS))


def test_a_left_over_tensor_is_named(saved, tmp_path):
    def add(tensors):
        tensors["transformer.h.9.extra"] = tensors[BIAS].clone()

    with pytest.raises(CheckpointError, match=r"unexpected keys: .*h\.9\.extra"):
        load_with(saved, tmp_path, add)


def test_a_misshapen_tensor_is_named(saved, tmp_path):
    def shorten(tensors):
        tensors[BIAS] = tensors[BIAS][:7].clone()

    with pytest.raises(CheckpointError, match=BIAS):
        load_with(saved, tmp_path, shorten)


def test_a_model_type_that_nobody_knows_is_refused_with_the_way_on(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    (refusal,) = bids_for(ModelSpec(tmp_path, "hf", {"model_type": "unheard_of"}), EngineConfig())
    assert isinstance(refusal, Refusal)
    assert "'unheard_of'" in refusal.reason
    assert "pip install -U transformers" in refusal.reason


def test_every_tier_bids_as_a_fallback_of_one_family():
    bids = bids_for(ModelSpec(Path("tiny"), "hf", {"model_type": "gpt2"}), EngineConfig())
    assert {bid.family for bid in bids} == {"transformers"}
    assert all(bid.is_fallback and bid.priority < 100 for bid in bids)
    by_name = {bid.name: bid.priority for bid in bids}
    assert by_name["transformers/paged"] > by_name["transformers/cache"]
