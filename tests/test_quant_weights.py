"""What quantization plugins build on: names sorted by linear, shapes checked, a tree's linears found."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from core.errors import CheckpointError
from core.layers import HalfTensor, TransposedTensor
from core.quant_weights import (
    by_module,
    kept_small,
    linear_weights,
    quantize_transposed,
    read_part,
    says_nothing,
    transposed_weights,
)
from core.weights import HFCheckpoint


@pytest.fixture
def checkpoint(tmp_path):
    tensors = {"a.q.qweight": torch.full((4, 2), 7, dtype=torch.int32), "a.q.bias": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return HFCheckpoint(tmp_path)


def test_names_are_sorted_by_linear():
    modules, others = by_module(["a.q.qweight", "a.q.bias", "b.scales", "a.q.scales", "norm"], ("qweight", "scales"))
    assert modules == {"a.q": {"qweight", "scales"}, "b": {"scales"}}
    assert others == ["a.q.bias", "norm"]


def test_a_part_of_another_shape_is_an_error_that_names_file_and_tensor(checkpoint):
    assert read_part(checkpoint, "a.q.qweight", (4, 2)).shape == (4, 2)
    with pytest.raises(
        CheckpointError, match=r"'a.q.qweight' of .*model.safetensors has shape \[4, 2\]; right is \[4\]"
    ):
        read_part(checkpoint, "a.q.qweight", (4,))
    with pytest.raises(CheckpointError, match=r"has no tensor 'a.q.scales'"):
        read_part(checkpoint, "a.q.scales")


def test_a_tensor_that_is_read_has_memory_of_its_own(checkpoint):
    file = checkpoint.file_of("a.q.qweight")
    tensor = checkpoint.tensor("a.q.qweight")
    file.write_bytes(bytes(file.stat().st_size))
    assert tensor.tolist() == [[7, 7]] * 4


def test_a_file_that_ends_within_a_tensor_is_an_error_that_names_both(checkpoint):
    tensor = checkpoint.tensor("a.q.bias")
    assert tensor.tolist() == [0, 0]
    file = checkpoint.file_of("a.q.qweight")
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 4)
    with pytest.raises(CheckpointError, match=r"model.safetensors ends within tensor 'a.q"):
        [checkpoint.tensor(name) for name in ("a.q.qweight", "a.q.bias")]


def test_only_a_bias_of_zeros_says_nothing():
    assert says_nothing("q.bias", torch.zeros(3))
    assert not says_nothing("q.bias", torch.ones(3))
    assert not says_nothing("q.weight", torch.zeros(3, 3))


def test_matrices_of_halves_are_kept_where_the_model_computes_in_float32():
    halves = torch.randn(4, 8).to(torch.float16)
    assert isinstance(kept_small(halves, torch.float32), HalfTensor)
    assert kept_small(halves, torch.float16) is halves
    assert kept_small(halves[0], torch.float32).dim() == 1
    assert not isinstance(kept_small(halves.float(), torch.float32), HalfTensor)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)
        self.inner, self.scaled, self.conv = nn.Linear(8, 8), Scaled(8, 8), nn.Conv1d(8, 8, 3)

    def get_output_embeddings(self):
        return self.head


class Conv1D(nn.Module):
    """Stands where transformers' own does: its weight is [in, out]."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(32, 16)), nn.Parameter(torch.zeros(16))

    __module__ = "transformers.pytorch_utils"


class Experts(nn.Module):
    is_transposed, has_gate = True, True

    def __init__(self):
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.randn(3, 32, 16)), nn.Parameter(torch.zeros(3, 16))


def test_weights_that_are_kept_input_first_count_too_and_are_named():
    model = nn.ModuleDict({"conv": Conv1D(), "experts": Experts(), "plain": nn.Linear(8, 8)})
    assert transposed_weights(model) == {"conv.weight", "experts.up"}
    assert linear_weights(model) == {"conv.weight", "experts.up", "plain.weight"}


def test_a_transposed_weight_is_quantized_along_its_inputs():
    def halved(name, weight):
        return HalfTensor({"values": weight.half()}, weight.shape[-1], weight.dtype)

    stack = torch.randn(3, 32, 16)
    found = quantize_transposed(halved, "experts.up", stack)
    assert isinstance(found, TransposedTensor)
    assert found.upright.parts["values"].shape == (3, 16, 32)
    assert torch.equal(found.dequantize(), stack.half().float())
    assert quantize_transposed(lambda name, weight: weight, "experts.up", stack) is stack


def test_linears_count_but_not_the_head_nor_what_computes_something_of_its_own():
    assert linear_weights(Tree()) == {"inner.weight"}
