"""Packed linears give what plain ones give, at any number of rows, and can be taken back."""

import pytest
import torch
from torch import nn

from core.layers import pack_linears, unpack_linears
from core.layers.linear import PackedLinear, can_pack, rounded_rows

pytestmark = pytest.mark.skipif(not can_pack(torch.empty(1, 1)), reason="this torch has no oneDNN")


def made(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias=bias), nn.ReLU(), nn.Linear(40, 8))


@pytest.mark.parametrize("rows", [0, 1, 2, 17, 33, 64, 65, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_linear_gives_the_plain_answer(rows, bias):
    model, x = made(bias), torch.randn(rows, 24)
    with torch.inference_mode():
        wanted = model(x)
        assert pack_linears(model, kinds=(nn.Linear,)) == 2
        torch.testing.assert_close(model(x), wanted)
        torch.testing.assert_close(model(x[None]), wanted[None])


def test_only_the_named_linears_are_packed():
    model = made()
    pack_linears(model, kinds=(nn.Linear,), only={model[2]})
    assert [isinstance(part, PackedLinear) for part in model] == [False, False, True]


def test_unpacking_gives_the_same_bits_back():
    model = made()
    weights = [part.weight.clone() for part in (model[0], model[2])]
    pack_linears(model, kinds=(nn.Linear,))
    assert torch.equal(model[0].weight, weights[0])  # a module may look at it
    unpack_linears(model)
    assert [type(part) for part in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert torch.equal(model[0].weight, weights[0])
    assert torch.equal(model[2].weight, weights[1])


def test_rows_are_rounded_up_by_an_eighth_at_most_and_to_few_sizes():
    rounded = [rounded_rows(rows) for rows in range(1, 1025)]
    assert all(rows <= up <= rows * 9 / 8 for rows, up in enumerate(rounded, 1))
    assert len(set(rounded)) == 64
