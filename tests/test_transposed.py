"""Quantized weights that a module keeps input first: products, and the choice of an expert, make no floats of all."""

import pytest
import torch
from torch import nn

from core.layers import AffineTensor, TransposedTensor, give_kernels, pack_codes

EXPERTS, OUT, IN = 3, 6, 32


@pytest.fixture
def stack():
    torch.manual_seed(0)
    parts = {"codes": pack_codes(torch.randint(0, 16, (EXPERTS, OUT, IN)), 4), "scales": torch.rand(EXPERTS, OUT, 2)}
    return TransposedTensor.of(AffineTensor(parts, IN, torch.float32, bits=4, group_size=16))


class Counting:
    """Kernels that multiply with the decoded weight, and count how often."""

    name, calls = "counting", 0

    def linear(self, weight, bias):
        floats = weight.dequantize()
        assert floats.shape == (OUT, IN)

        def multiply(x):
            self.calls += 1
            return x @ floats.T

        return multiply


def no_floats(monkeypatch):
    def refuse(self):
        raise AssertionError("a whole weight became floats")

    monkeypatch.setattr(TransposedTensor, "decode", refuse)


def test_its_shape_and_floats_are_those_of_the_transposed_weight(stack):
    assert stack.shape == (EXPERTS, IN, OUT)
    assert stack.out_features == OUT
    assert torch.equal(stack.dequantize(), stack.upright.dequantize().transpose(1, 2))
    assert stack.num_bytes == stack.upright.num_bytes


@pytest.mark.parametrize("index", [1, -1, torch.tensor(2)])
def test_an_experts_product_makes_no_floats_of_the_stack(stack, index, monkeypatch):
    x, wanted = torch.randn(5, IN), stack.dequantize()
    no_floats(monkeypatch)
    torch.testing.assert_close(x @ stack[index], x @ wanted[index])


def test_all_experts_multiply_batches_of_their_own(stack, monkeypatch):
    x, wanted = torch.randn(EXPERTS, 5, IN), stack.dequantize()
    no_floats(monkeypatch)
    torch.testing.assert_close(torch.bmm(x, stack), torch.bmm(x, wanted))


def test_a_product_with_a_bias_is_what_it_is_with_floats(stack, monkeypatch):
    x, bias, wanted = torch.randn(5, IN), torch.randn(OUT), stack.dequantize()[0]
    no_floats(monkeypatch)
    torch.testing.assert_close(torch.addmm(bias, x, stack[0]), torch.addmm(bias, x, wanted))


def test_anything_else_sees_the_floats(stack):
    floats = stack.dequantize()
    assert torch.equal(stack[:, 3:5], floats[:, 3:5])
    assert torch.equal(stack[0][2], floats[0][2])
    assert torch.equal(torch.cat([stack, stack], 1), torch.cat([floats, floats], 1))
    assert torch.equal(torch.nn.functional.linear(torch.eye(OUT), stack[0]), floats[0].T)
    assert torch.equal(stack.transpose(1, 2), floats.transpose(1, 2))


def test_kernels_are_asked_for_the_upright_weight(stack):
    module, kernels, x = nn.Module(), Counting(), torch.randn(5, IN)
    module.stack = nn.Parameter(stack, requires_grad=False)
    module.one = nn.Parameter(stack[0], requires_grad=False)
    wanted = x @ stack.dequantize()[0]
    give_kernels(module, kernels)
    torch.testing.assert_close(x @ module.stack[0], wanted)
    torch.testing.assert_close(x @ module.one, wanted)
    assert kernels.calls == 2
    give_kernels(module, None)
    torch.testing.assert_close(x @ module.stack[0], wanted)
    torch.testing.assert_close(x @ module.one, wanted)
    assert kernels.calls == 2


def test_a_copy_of_another_dtype_stays_quantized(stack):
    half = stack.to(torch.bfloat16)
    assert isinstance(half, TransposedTensor)
    assert half.upright.dtype == torch.bfloat16
    assert torch.equal(half.dequantize(), stack.dequantize().bfloat16())
