"""Codes, scales and floats are those of bitsandbytes, bit for bit."""

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch

from core.layers import QuantizedTensor, TableTensor, unpack_codes
from core_quant_bnb import four_bit, int8


def _weight(rows, columns):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    weight[0] = 0  # blocks without a largest number
    return weight


def _packed_by_bnb(codes):
    flat = codes.flatten()
    flat = torch.cat([flat, flat.new_zeros(len(flat) % 2)])
    return flat[0::2] << 4 | flat[1::2]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(48, 128), (7, 96), (5, 100), (3, 33)])
def test_codes_and_scales_are_bitsandbytes_own(kind, shape):
    weight = _weight(*shape)
    wanted, state = bnb_functional.quantize_4bit(weight, quant_type=kind)
    codes, absmax = four_bit.quantize_flat(weight.flatten(), kind, 64)
    whole = weight.numel() // 2  # bitsandbytes fills an odd half byte with any code
    assert torch.equal(_packed_by_bnb(codes)[:whole], wanted.flatten()[:whole])
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(four_bit.table_of(kind), state.code)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floats_are_bitsandbytes_own(kind, dtype):
    weight = _weight(48, 128).to(dtype)
    made = four_bit.quantize(weight, kind)
    assert isinstance(made, TableTensor)
    assert made.dtype == dtype
    assert torch.equal(
        made.dequantize(), bnb_functional.dequantize_4bit(*bnb_functional.quantize_4bit(weight, quant_type=kind))
    )


@pytest.mark.parametrize("columns", [96, 100])
def test_blocks_that_run_over_the_ends_of_rows_keep_their_scales(columns):
    """Not compared with bitsandbytes 0.50.2, whose AVX-512 code takes the scales of other blocks for 96 columns."""
    weight = _weight(64, columns)
    made = four_bit.quantize(weight, "nf4")
    _, absmax = four_bit.quantize_flat(weight.flatten(), "nf4", 64)
    codes = unpack_codes(made.parts["codes"], 4).flatten().int()
    blocks = torch.tensor(four_bit.NF4)[codes].view(-1, 64) * absmax.unsqueeze(1)
    assert torch.equal(made.dequantize(), blocks.view(64, columns))


def test_rows_of_an_odd_number_of_weights_stay_floats():
    weight = _weight(4, 33)
    assert four_bit.quantize(weight, "nf4") is weight


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_stack_of_experts_is_quantized_one_by_one(kind):
    experts = [_weight(16, 128), _weight(16, 128) / 3]
    quantize = int8.quantize if kind == "int8" else lambda weight: four_bit.quantize(weight, kind)
    stack = quantize(torch.stack(experts))
    assert isinstance(stack, QuantizedTensor)
    assert torch.equal(stack.dequantize(), torch.stack([quantize(expert).dequantize() for expert in experts]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_bitsandbytes_own(dtype):
    weight = _weight(48, 96).to(dtype)
    wanted = bnb.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
    made = int8.quantize(weight)
    assert torch.equal(made.parts["codes"].int() - 128, wanted.data.int())
    assert torch.equal(made.parts["absmax"].flatten(), wanted.SCB)
    floats = bnb_functional.int8_vectorwise_dequant(wanted.data, wanted.SCB)
    assert torch.equal(made.decode(), floats)
    assert torch.equal(made[3:9].decode(), floats[3:9])


def test_what_kernels_multiply_with_is_the_same_within_a_bit():
    made = int8.quantize(_weight(48, 96))
    by_scales = (made.parts["codes"].float() - 128) * made.parts["scales"]
    torch.testing.assert_close(by_scales, made.decode(), rtol=3e-7, atol=0)
