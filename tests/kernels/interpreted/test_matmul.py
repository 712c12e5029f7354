"""Matrix products: weights in 4 and 8 bits, and experts of a mixture. Each beside its plain torch twin."""

import pytest
import torch
from helpers import assert_near, poisoned

from core.errors import KernelError
from core.kernels.dequant_matmul import Codes, dequant_matmul
from core.kernels.grouped_matmul import grouped_matmul

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pack(codes):
    """4-bit codes [out, in] -> uint8 [out, in / 2], low nibble first."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def plain_weight(codes, scales, zeros, offsets, group):
    size = codes.shape[1]
    scales, zeros, offsets = (
        x if x is None else x.double().repeat_interleave(group, 1)[:, :size] for x in (scales, zeros, offsets)
    )
    weight = codes.double() - (0 if zeros is None else zeros)
    return weight * scales + (0 if offsets is None else offsets)


FORMATS = {  # bits, group, in, zeros, offsets, bias
    "awq and gptq": (4, 32, 96, True, False, False),
    "4 bits with offsets": (4, 64, 128, False, True, True),
    "4 bits, one scale a row": (4, 70, 70, True, False, False),
    "4 bits around the middle": (4, 64, 64, False, False, False),
    "nf4": (4, 64, 128, False, False, False),
    "int8, one scale a row": (8, 50, 50, False, False, True),
    "uint8 in groups": (8, 128, 256, True, False, False),
    "float8 in blocks, the last one short": (8, 64, 100, False, False, True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_and_multiply(name, dtype, device):
    bits, group, size, has_zeros, has_offsets, has_bias = FORMATS[name]
    outputs, rows, signed = 75, 5, name.startswith("int8")
    low, high = (-128, 128) if signed else (0, 2**bits)
    codes = torch.randint(low, high, (outputs, size), dtype=torch.int8 if signed else torch.uint8, device=device)
    numbers = (outputs, -(-size // group))
    scales = (torch.rand(numbers, device=device) / 8 + 0.01).to(dtype)
    zeros = torch.randint(0, 2**bits, numbers, dtype=torch.uint8, device=device) if has_zeros else None
    offsets = torch.randn(numbers, device=device).to(dtype) if has_offsets else None
    bias = torch.randn(outputs, device=device).to(dtype) if has_bias else None
    x = torch.randn(rows, size, device=device).to(dtype)
    y = poisoned(rows, outputs, dtype=dtype, device=device)
    kept = pack(codes) if bits == 4 else codes
    table = torch.randn(2**bits, device=device) if name.startswith(("nf4", "float8")) else None
    middle = 8 if "middle" in name else None
    dequant_matmul(x, Codes(kept, scales, bits, group, size, zeros, offsets, middle, table), y, bias)
    values = codes.double() - (middle or 0) if table is None else table[codes.int()]
    wanted = x.double() @ plain_weight(values, scales, zeros, offsets, group).T
    assert_near(y, wanted + (0 if bias is None else bias.double()), dtype)


def test_groups_that_no_kernel_takes_are_refused():
    with pytest.raises(KernelError, match="groups of 24 columns; they must be a multiple of 32"):
        weight = Codes(torch.ones(8, 24, dtype=torch.uint8), torch.ones(8, 2), 4, 24, 48)
        dequant_matmul(torch.ones(1, 48), weight, torch.ones(1, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [[5, 0, 19], [0, 0, 1], [3, 3, 3, 3, 3]], ids=str)
def test_grouped_matmul_gives_each_row_its_experts_weight(counts, dtype, device):
    experts, rows, size, outputs = len(counts), sum(counts), 40, 70
    x = torch.randn(4, size, device=device).to(dtype)
    source = torch.randint(0, 4, (rows,), dtype=torch.int32, device=device)
    weights = torch.randn(experts, outputs, size, device=device).to(dtype)
    bias = torch.randn(experts, outputs, device=device).to(dtype)
    starts = torch.tensor([0, *counts], device=device).cumsum(0).int()
    y = poisoned(rows, outputs, dtype=dtype, device=device)
    grouped_matmul(x, weights, starts, y, source, bias)
    expert = torch.repeat_interleave(torch.arange(experts), torch.tensor(counts)).to(device)
    wanted = torch.einsum("rk,rnk->rn", x[source].double(), weights[expert].double()) + bias[expert].double()
    assert_near(y, wanted, dtype)


def test_grouped_matmul_takes_weights_that_are_kept_input_first(device):
    x, weights = torch.randn(5, 36, device=device), torch.randn(2, 36, 50, device=device).transpose(1, 2)
    y = poisoned(5, 50, device=device)
    grouped_matmul(x, weights, torch.tensor([0, 2, 5], dtype=torch.int32, device=device), y)
    assert_near(y, torch.cat([x[:2] @ weights[0].T, x[2:] @ weights[1].T]))


def test_grouped_matmul_of_sorted_rows_leaves_rows_of_nobody_alone(device):
    x, weights = torch.randn(6, 32, device=device), torch.randn(2, 8, 32, device=device)
    y = poisoned(6, 8, device=device)
    grouped_matmul(x, weights, torch.tensor([0, 2, 5], dtype=torch.int32, device=device), y)
    assert_near(y[:2], x[:2] @ weights[0].T)
    assert_near(y[2:5], x[2:5] @ weights[1].T)
    assert y[5].isnan().all()
