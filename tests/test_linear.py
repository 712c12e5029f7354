"""Packed linears give what plain ones give, at any number of rows, and can be taken back; kernels are asked first."""

import pytest
import torch
from torch import nn

from core.layers import AffineTensor, Embedding, Head, QuantizedLinear, pack_linears, unpack_linears
from core.layers.linear import KernelLinear, PackedLinear, can_pack, rounded_rows
from core.layers.quant_formats import as_halves

needs_onednn = pytest.mark.skipif(not can_pack(torch.empty(1, 1)), reason="this torch has no oneDNN")


def made(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias=bias), nn.ReLU(), nn.Linear(40, 8))


@needs_onednn
@pytest.mark.parametrize("rows", [0, 1, 2, 17, 33, 64, 65, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_linear_gives_the_plain_answer(rows, bias):
    model, x = made(bias), torch.randn(rows, 24)
    with torch.inference_mode():
        wanted = model(x)
        assert pack_linears(model, kinds=(nn.Linear,)) == 2
        torch.testing.assert_close(model(x), wanted)
        torch.testing.assert_close(model(x[None]), wanted[None])


@needs_onednn
def test_only_the_named_linears_are_packed():
    model = made()
    pack_linears(model, kinds=(nn.Linear,), only={model[2]})
    assert [isinstance(part, PackedLinear) for part in model] == [False, False, True]


@needs_onednn
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


class HalvesAndCodes:
    """Kernels for every weight but float32 ones; their answers are marked by a 1 added."""

    name = "marked"

    def linear(self, weight, bias):
        if weight.dtype == torch.float32 and not isinstance(weight, AffineTensor):
            return None
        return lambda x: nn.functional.linear(x, weight.dequantize() if weight.dtype == torch.float32 else weight) + 1


def affine():
    parts = {"codes": torch.randint(0, 256, (40, 24), dtype=torch.uint8), "scales": torch.rand(40, 3)}
    return AffineTensor(parts, 24, torch.float32, bits=8, group_size=8)


def test_kernels_are_asked_first_and_float32_goes_on_as_it_did():
    model = nn.Sequential(nn.Linear(24, 40, bias=False), nn.Linear(24, 40, bias=False), nn.Linear(24, 40).half())
    model[0].weight = nn.Parameter(affine(), requires_grad=False)
    wanted = nn.functional.linear(torch.ones(1, 24), model[0].weight.dequantize()) + 1
    assert pack_linears(model, kinds=(nn.Linear,), kernels=HalvesAndCodes()) == 2 + can_pack(torch.empty(1, 1))
    kinds = [QuantizedLinear, PackedLinear if can_pack(torch.empty(1, 1)) else nn.Linear, KernelLinear]
    assert [type(part) for part in model] == kinds
    torch.testing.assert_close(model[0](torch.ones(1, 24)), wanted)


@needs_onednn
def test_kernels_that_are_the_faster_way_take_float32_as_it_lies():
    class All(HalvesAndCodes):
        takes_float32 = True

        def linear(self, weight, bias):
            return None if weight.shape[0] == 8 else lambda x: nn.functional.linear(x, weight, bias) + 1

    model, x = made(), torch.randn(3, 24)
    weight, wanted = model[0].weight.data_ptr(), model[0](x) + 1
    pack_linears(model, kinds=(nn.Linear,), kernels=All())
    assert [type(part) for part in model] == [KernelLinear, nn.ReLU, PackedLinear]  # what they decline is packed
    assert model[0].weight.data_ptr() == weight
    torch.testing.assert_close(model[0](x), wanted)


def test_a_quantized_linear_without_kernels_stays_small_and_right():
    model, x = nn.Sequential(nn.Linear(24, 40)), torch.randn(3, 24)
    model[0].weight = nn.Parameter(affine(), requires_grad=False)
    wanted = model(x)
    pack_linears(model, kinds=(nn.Linear,))
    assert isinstance(model[0].weight, AffineTensor)
    torch.testing.assert_close(model(x), wanted)
    unpack_linears(model)
    assert type(model[0]) is nn.Linear and isinstance(model[0].weight, AffineTensor)


def test_a_head_tied_to_a_quantized_embedding_shares_its_bytes():
    model = nn.Sequential(Embedding(40, 24, torch.float32), Head(24, 0, False, torch.float32))
    model[0].weight = nn.Parameter(affine(), requires_grad=False)
    model[1].tie(model[0])
    pack_linears(model, kinds=(Head,), kernels=HalvesAndCodes())
    assert model[1].kernel is not None
    assert model[1].weight.parts["codes"].data_ptr() == model[0].weight.parts["codes"].data_ptr()


@needs_onednn
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_float_head_that_an_embedding_shares_is_not_copied_in_a_quantized_model(rows):
    codes, scales = torch.randint(0, 256, (16, 8), dtype=torch.uint8), torch.rand(16, 1)
    small = AffineTensor({"codes": codes, "scales": scales}, 16, torch.float32, bits=4, group_size=16)
    model = nn.ModuleDict({"embedding": nn.Embedding(50, 16), "small": nn.Linear(16, 16), "head": nn.Linear(16, 50)})
    model["small"].weight = nn.Parameter(small, requires_grad=False)
    model["head"].weight = model["embedding"].weight
    x = torch.randn(2, rows, 16)
    wanted = model["head"](x)
    pack_linears(model, kinds=(nn.Linear,))
    assert model["head"].weight is model["embedding"].weight
    torch.testing.assert_close(model["head"](x), wanted)
    unpack_linears(model)
    assert type(model["head"]) is nn.Linear and model["head"].weight is model["embedding"].weight


@pytest.mark.parametrize("odd", [1 + 2**-20, 1e38 * 3.3, float("nan"), 2**-140])
def test_one_number_that_two_bytes_do_not_hold_keeps_a_weight_in_four(odd):
    weight = torch.zeros(600, 100)
    assert as_halves(weight) is not None
    weight[577, 3] = odd
    assert as_halves(weight) is None
