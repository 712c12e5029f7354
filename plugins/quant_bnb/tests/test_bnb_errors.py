"""A damaged checkpoint, or an option that does not fit, is an error that names what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.config import EngineConfig
from core.errors import CheckpointError, ConfigError
from core.spec import ModelSpec
from core.weights import HFCheckpoint
from core_quant_bnb.choice import choose_method
from core_quant_bnb.read import read_tensors

Q_PROJ = "model.layers.0.self_attn.q_proj"
WEIGHT, STATE = f"{Q_PROJ}.weight", f"{Q_PROJ}.weight.quant_state.bitsandbytes__nf4"


def _read(folder):
    return list(read_tensors(HFCheckpoint(folder), torch.float32))


@pytest.mark.parametrize(
    ("kind", "missing", "message"),
    [
        ("nf4", ".weight.absmax", rf"'{WEIGHT}' of .*\.safetensors is quantized, but '{WEIGHT}\.absmax' is missing"),
        ("nf4", ".weight.quant_map", rf"'{WEIGHT}\.quant_map' is missing"),
        ("nf4", ".weight.quant_state.bitsandbytes__nf4", rf"'{WEIGHT}' of .*\.safetensors is quantized, but has no"),
        ("nf4-double", ".weight.nested_absmax", rf"'{WEIGHT}\.nested_absmax' is missing"),
        ("nf4-double", ".weight.nested_quant_map", rf"'{WEIGHT}\.nested_quant_map' is missing"),
        ("int8", ".SCB", rf"'{Q_PROJ}\.SCB' is missing"),
        ("nf4", ".weight", rf"'{WEIGHT}\.\w+' of .*model\.safetensors belongs to '{WEIGHT}', which is missing"),
    ],
)  # fmt: skip
def test_a_missing_part_is_named_with_its_file(damaged, kind, missing, message):
    with pytest.raises(CheckpointError, match=message):
        _read(damaged(kind, lambda tensors: tensors.pop(Q_PROJ + missing)))


@pytest.mark.parametrize(
    ("kind", "part", "value", "message"),
    [
        ("nf4", ".weight.absmax", torch.ones(3), r"q_proj\.weight\.absmax' of .* has shape \[3\]; right is \[64\]"),
        ("nf4", ".weight", torch.zeros(7, 1, dtype=torch.uint8), r"q_proj\.weight' of .* holds 7 bytes, .*\[64, 64\]"),
        ("nf4", ".weight.quant_map", torch.ones(15), r"q_proj\.weight\.quant_map' of .* has shape \[15\]"),
        ("nf4-double", ".weight.nested_absmax", torch.ones(9), r"nested_absmax' of .* has shape \[9\]; right is \[1\]"),
        ("nf4-double", ".weight.absmax", torch.ones(64), r"absmax' of .* is torch\.float32; nested scales are uint8"),
        ("int8", ".SCB", torch.ones(5), r"q_proj\.SCB' of .* has shape \[5\]; right is \[64\]"),
        ("int8", ".weight", torch.ones(64, 64), r"q_proj\.weight' of .* is torch\.float32 \[64, 64\]; int8"),
        ("int8", ".weight_format", torch.tensor(2, dtype=torch.uint8), r"q_proj\.weight' of .* for one kind of GPU"),
    ],
)  # fmt: skip
def test_a_part_of_the_wrong_shape_or_kind_is_named_with_its_file(damaged, kind, part, value, message):
    with pytest.raises(CheckpointError, match=message):
        _read(damaged(kind, lambda tensors: tensors.update({Q_PROJ + part: value})))


@pytest.mark.parametrize("text", [b"{not json", b"[]", b'{"quant_type": "nf4"}', b'{"shape": [-1, 2]}', b"\xff"])
def test_a_state_that_makes_no_sense_is_named(damaged, text):
    state = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"bitsandbytes__nf4' of .*model\.safetensors does not describe a matrix"):
        _read(damaged("nf4", lambda tensors: tensors.update({STATE: state})))


def test_a_file_that_is_cut_short_is_named(damaged):
    folder = damaged("nf4")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short .* ends before tensor"):
        _read(folder)


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("stated", "asked", "name"),
    [
        (None, None, None),
        (None, "bitsandbytes-nf4", "bitsandbytes-nf4"),
        (None, "awq", None),
        (NF4, None, "bitsandbytes"),
        (NF4, "bitsandbytes", "bitsandbytes"),
        (NF4, "bitsandbytes-nf4", "bitsandbytes"),
        ({"load_in_8bit": True}, None, "bitsandbytes"),
        ({"quant_method": "awq"}, None, None),
    ],
)
def test_config_and_option_choose_the_method(stated, asked, name):
    spec = ModelSpec(Path("m"), "hf", {"quantization_config": stated})
    method = choose_method(spec, EngineConfig(quantization=asked))
    assert (method and method.name) == name
    assert method is None or method.on_the_fly == (stated is None)


@pytest.mark.parametrize(
    ("stated", "asked", "message"),
    [
        (NF4, "bitsandbytes-int8", "asks for 'bitsandbytes-int8', and m is quantized with 'bitsandbytes-nf4' already"),
        ({"quant_method": "awq"}, "bitsandbytes-nf4", "m is quantized with 'awq' already"),
        (None, "bitsandbytes", "choose bitsandbytes-nf4, bitsandbytes-fp4, bitsandbytes-int8"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(stated, asked, message):
    with pytest.raises(ConfigError, match=message):
        choose_method(ModelSpec(Path("m"), "hf", {"quantization_config": stated}), EngineConfig(quantization=asked))


def test_neither_choosing_nor_reading_imports_bitsandbytes(bnb_folder):
    code = f"""
import sys
import core_quant_bnb
assert "torch" not in sys.modules
from core.config import EngineConfig
from core.weights import HFCheckpoint
checkpoint = HFCheckpoint({str(bnb_folder("nf4")[0])!r})
method = core_quant_bnb.provide_quant_method(checkpoint.spec, EngineConfig())
import torch
assert len(list(method.tensors(checkpoint, torch.float32)))
assert "bitsandbytes" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
