"""A quantized weight stands wherever a float one would, and stays small while rows are picked and joined."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.errors import CoreError
from core.layers import (
    AffineTensor,
    HalfTensor,
    QuantizedLinear,
    QuantizedTensor,
    TableTensor,
    give_kernels,
    pack_codes,
    unpack_codes,
)

IN, GROUP = 128, 32
TABLE = tuple(float(value) for value in torch.linspace(-1, 1, 16))


def codes(rows, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*rows, IN * bits // 8), dtype=torch.uint8, generator=generator)


def affine(rows=(48,), bits=4, seed=0, dtype=torch.float32, **parts):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(*rows, IN // GROUP, generator=generator)
    parts = {"codes": codes(rows, bits, seed), "scales": scales, **parts}
    return AffineTensor(parts, IN, dtype, bits=bits, group_size=GROUP)


def table(rows=(48,), seed=0):
    scales = torch.rand(*rows, IN // GROUP, generator=torch.Generator().manual_seed(seed))
    parts = {"codes": codes(rows, 4, seed), "scales": scales}
    return TableTensor(parts, IN, torch.float32, group_size=GROUP, table=TABLE)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_survive_packing(bits):
    values = torch.randint(0, 1 << bits, (3, IN))
    packed = pack_codes(values, bits)
    assert packed.shape == (3, IN * bits // 8)
    assert torch.equal(unpack_codes(packed, bits).long(), values)


def test_a_code_counts_from_the_middle_from_its_zero_or_adds_an_offset():
    scales = torch.full((1, IN // GROUP), 0.5)
    same = {"codes": torch.full((1, IN // 2), 0x93, dtype=torch.uint8), "scales": scales}

    def first_two(**parts):
        return AffineTensor({**same, **parts}, IN, torch.float32, bits=4, group_size=GROUP).dequantize()[0, :2].tolist()

    assert first_two() == [(3 - 8) * 0.5, (9 - 8) * 0.5]
    assert first_two(zeros=torch.full((1, IN // GROUP), 2, dtype=torch.uint8)) == [0.5, 3.5]
    assert first_two(offsets=torch.full((1, IN // GROUP), -1.0)) == [0.5, 3.5]


def test_columns_in_another_order_come_back_in_their_own():
    order = torch.randperm(IN)
    plain = affine()
    ordered = AffineTensor(plain.parts, IN, torch.float32, bits=4, group_size=GROUP, order=order)
    assert torch.equal(ordered.dequantize()[:, order], plain.dequantize())


def test_a_table_gives_its_values_times_the_groups_scale():
    weight = table()
    code = int(weight.parts["codes"][3, 20]) & 15  # of column 40, in group 1
    assert weight.dequantize()[3, 40] == torch.tensor(TABLE)[code] * weight.parts["scales"][3, 1]


@pytest.mark.parametrize("weight", [affine(), affine(bits=8), table()], ids=lambda weight: weight.packing)
def test_modules_compute_with_it_as_with_the_floats(weight):
    plain, x = weight.dequantize(), torch.randn(2, 5, IN)
    parameter = nn.Parameter(weight, requires_grad=False)
    assert isinstance(parameter, QuantizedTensor) and isinstance(parameter, nn.Parameter)
    with torch.inference_mode():
        torch.testing.assert_close(F.linear(x, parameter), F.linear(x, plain))
        torch.testing.assert_close(x @ parameter.T, x @ plain.T)
        ids = torch.tensor([[1, 47], [0, 1]])
        assert torch.equal(F.embedding(ids, parameter), F.embedding(ids, plain))
        assert torch.equal(parameter * 2, plain * 2)


def test_many_rows_are_never_floats_at_once():
    rows = affine((3000,))
    largest = []

    class Watched(AffineTensor):
        def decode(self):
            largest.append(len(self))
            return super().decode()

    watched = Watched(rows.parts, IN, torch.float32, **rows.settings)
    x, bias = torch.randn(2, IN), torch.randn(3000)
    torch.testing.assert_close(watched.linear(x, bias), F.linear(x, rows.dequantize(), bias))
    assert max(largest) <= 1024


def test_experts_are_stacked_joined_and_picked_without_becoming_floats():
    experts = [affine(seed=seed) for seed in range(3)]
    stacked = torch.stack(experts)
    merged = torch.cat([stacked, stacked], 1)
    assert isinstance(merged, AffineTensor) and merged.shape == (3, 96, IN)
    assert isinstance(merged[2], AffineTensor)
    assert torch.equal(merged[2].dequantize()[48:], experts[2].dequantize())
    assert torch.equal(merged[1, 5:7].dequantize(), merged.dequantize()[1, 5:7])


def test_experts_of_a_stack_multiply_with_kernels_once_these_are_given():
    asked = []

    class Doubling:
        name = "doubling"

        def linear(self, weight, bias):
            asked.append(weight)
            return lambda x: 2 * F.linear(x, weight.dequantize())

    module = nn.Module()
    module.experts = nn.Parameter(torch.stack([affine(seed=seed) for seed in range(3)]), requires_grad=False)
    x, plain = torch.randn(4, IN), module.experts.dequantize()
    give_kernels(module, Doubling())
    for index in (1, torch.tensor(1), -2):
        torch.testing.assert_close(F.linear(x, module.experts[index]), 2 * F.linear(x, plain[1]))
    assert len(asked) == 1
    give_kernels(module, None)
    torch.testing.assert_close(F.linear(x, module.experts[1]), F.linear(x, plain[1]))


def test_halves_are_seen_as_the_floats_that_they_are():
    values = torch.randn(48, IN).to(torch.bfloat16)
    weight, x = HalfTensor({"values": values}, IN, torch.float32), torch.randn(4, IN)
    assert weight.dtype == torch.float32
    assert weight.num_bytes == 2 * values.numel()
    assert torch.equal(weight.dequantize(), values.float())
    torch.testing.assert_close(F.linear(x, weight), F.linear(x, values.float()))
    assert torch.equal(F.embedding(torch.tensor([3]), weight), values[3:4].float())


def test_rows_of_different_kinds_are_joined_as_floats():
    joined = torch.cat([affine(), table()])
    assert not isinstance(joined, QuantizedTensor)
    assert torch.equal(joined, torch.cat([affine().dequantize(), table().dequantize()]))


def test_an_index_into_the_columns_gives_the_floats():
    weight = affine()
    assert torch.equal(weight[:, 3:9], weight.dequantize()[:, 3:9])
    mask = torch.rand(48, IN) > 0.5
    assert torch.equal(weight[mask], weight.dequantize()[mask])


def test_it_keeps_its_parts_over_copies_dtypes_and_state_dicts():
    weight = affine()
    half = weight.to(torch.float16)
    assert isinstance(half, AffineTensor) and half.dtype == torch.float16
    assert half.dequantize().dtype == torch.float16
    assert half.parts["codes"] is weight.parts["codes"]
    assert torch.equal(copy.deepcopy(weight).dequantize(), weight.dequantize())
    assert isinstance(weight.detach(), AffineTensor) and isinstance(weight.clone(), AffineTensor)
    layer = QuantizedLinear(weight, None)
    assert isinstance(layer.state_dict()["weight"], AffineTensor)


def test_writing_into_it_is_an_error():
    with pytest.raises(CoreError, match="would write into a quantized weight"):
        affine().mul_(2)
    floats = torch.empty(48, IN)
    floats.copy_(affine())
    assert torch.equal(floats, affine().dequantize())


def test_a_layer_uses_its_kernel():
    weight, x = affine(), torch.randn(4, IN)
    assert torch.equal(QuantizedLinear(weight, None, kernel=lambda x: x.sum())(x), x.sum())
    bias = torch.randn(48)
    torch.testing.assert_close(QuantizedLinear(weight, bias)(x), F.linear(x, weight.dequantize(), bias))


def test_experts_of_a_stack_keep_an_order_of_their_own():
    torch.manual_seed(0)
    experts = [affine(seed=seed) for seed in range(3)]
    orders = [torch.randperm(IN), None, torch.randperm(IN)]
    experts = [expert.with_order(order) for expert, order in zip(experts, orders, strict=True)]
    stack, floats = torch.stack(experts), torch.stack([expert.dequantize() for expert in experts])
    assert isinstance(stack, AffineTensor)
    assert torch.equal(stack.dequantize(), floats)
    for index in (0, torch.tensor(2), slice(1, 3), [2, 0], (1, slice(2, 4)), (slice(0, 2), slice(1, 3))):
        assert isinstance(stack[index], AffineTensor), index
        assert torch.equal(stack[index].dequantize(), floats[index]), index
    both = torch.cat([stack, stack], 1)
    assert isinstance(both, AffineTensor)
    assert torch.equal(both[1].dequantize(), torch.cat([floats[1], floats[1]]))
    pairs = (torch.tensor([0, 2]), torch.tensor([1, 1]))
    assert torch.equal(stack[pairs], floats[pairs])


def test_experts_with_orders_of_their_own_multiply_with_kernels():
    experts = [affine(seed=seed).with_order(torch.randperm(IN)) for seed in range(2)]
    module, x = nn.Module(), torch.randn(3, IN)
    module.stack = nn.Parameter(torch.stack(experts), requires_grad=False)
    kernels = SimpleNamespace(linear=lambda weight, bias: lambda x: x @ weight.dequantize().T)
    give_kernels(module, kernels)
    for index, expert in enumerate(experts):
        torch.testing.assert_close(F.linear(x, module.stack[index]), x @ expert.dequantize().T)


def test_loading_a_quantized_weight_imports_neither_distributed_tensors_nor_sympy():
    """Tens of MB, and half a second: torch imports both where a tensor goes through __torch_dispatch__."""
    code = """
import sys, torch
from torch import nn
from core.layers import AffineTensor
from core.layers.linear import on_device
parts = {"codes": torch.zeros(8, 32, dtype=torch.uint8), "scales": torch.ones(8, 1)}
nn.Parameter(AffineTensor(parts, 32, torch.float32, bits=8, group_size=32), requires_grad=False)
on_device(torch.empty(8, 8, device="meta"), torch.device("cpu"))
print([name for name in ("torch.distributed.tensor", "sympy") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
