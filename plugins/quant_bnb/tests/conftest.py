"""Tiny checkpoints that bitsandbytes itself made, by way of transformers."""

import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from core.testing import tiny_checkpoint

CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "nf4-bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    "nf4-skip": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["lm_head", "model.layers.0.mlp", "k_proj"],
    },
}


@pytest.fixture(scope="session")
def float_folder(tmp_path_factory):
    """A llama whose weights are matrices of 64 and 128 columns."""
    return tiny_checkpoint(
        "llama", tmp_path_factory.mktemp("float"), hidden_size=64, intermediate_size=128, head_dim=16
    )


@pytest.fixture(scope="session")
def bnb_folder(float_folder, tmp_path_factory):
    """Return a function: kind of CONFIGS -> the folder that transformers saved, and bitsandbytes' own module."""
    return _saver(float_folder, tmp_path_factory)


@pytest.fixture(scope="session")
def bnb_gpt2(tmp_path_factory):
    """The same of a GPT-2, whose linears have their weights transposed."""
    return _saver(tiny_checkpoint("gpt2", tmp_path_factory.mktemp("gpt2"), hidden_size=64), tmp_path_factory)


def _saver(source, tmp_path_factory):
    @cache
    def make(kind):
        wanted = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **CONFIGS[kind])
        module = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=wanted, dtype=torch.float32, device_map="cpu"
        )
        folder = tmp_path_factory.mktemp(kind)
        module.save_pretrained(folder)
        return folder, module

    return make


@pytest.fixture
def damaged(bnb_folder, tmp_path):
    """Return a function: copy a checkpoint, changing its tensors or its config in place."""

    def make(kind, change=lambda tensors: None, change_config=lambda config: None):
        folder, _ = bnb_folder(kind)
        tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        change(tensors)
        change_config(config)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return make
