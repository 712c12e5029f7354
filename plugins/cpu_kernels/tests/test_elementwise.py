"""Norms, gates and rotations in one pass give what torch gives in several, whatever the instruction set."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.layers import GatedMLP, RMSNorm, take_kernels
from core.layers.rotary import apply_rotary

pytest.importorskip("core_cpu_kernels", reason="not installed where there is no C++ compiler")
from core_cpu_kernels.kernels import CpuKernels
from core_cpu_kernels.library import instruction_sets

SETS = [name for name in instruction_sets() if name not in ("amx", "avx512vnni")]  # those have the code of avx512

BOUND = 1e-6  # relative, by norm
WIDTHS = [1, 7, 64, 100, 577]
ROWS = [1, 3, 600]  # the last is shared out among threads at the larger widths


@pytest.fixture(params=SETS)
def kernels(request):
    return CpuKernels(request.param)


def assert_close(found, wanted):
    assert found.shape == wanted.shape and found.dtype == torch.float32
    assert (found.double() - wanted).norm() <= BOUND * wanted.norm() + 1e-9


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_norm_of_x_and_of_x_added_to_a_residual(kernels, width, rows):
    x, residual, weight = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    norm = kernels.rms_norm(weight, 1e-5)
    both = residual.double() + x.double()
    assert_close(norm(x), F.rms_norm(x.double(), (width,), weight.double(), 1e-5))
    for summed in (torch.empty_like(x), residual):
        assert_close(norm.add(x, residual, summed), F.rms_norm(both, (width,), weight.double(), 1e-5))
        assert_close(summed, both)


def test_a_norm_of_strided_heads_leaves_them_as_they_were(kernels):
    merged, weight = torch.randn(5, 6 * 16), torch.rand(16)
    heads = merged[:, 16:64].unflatten(-1, (-1, 16))
    before = merged.clone()
    assert_close(kernels.rms_norm(weight, 1e-6)(heads), F.rms_norm(heads.double(), (16,), weight.double(), 1e-6))
    assert torch.equal(merged, before)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_gated_activations(kernels, width, rows, activation):
    gate_up = torch.randn(rows, 2 * width) * 5
    gate, up = gate_up.double().chunk(2, -1)
    wanted = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    assert_close(kernels.gate(activation)(gate_up), wanted * up)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_an_activation_of_huge_numbers_is_no_nan(kernels, activation):
    gate_up = torch.tensor([[-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30] + [1.0] * 7])
    wanted = torch.tensor([[0.0, 0.0, 0.0, 0.0, 90.0, 200.0, 1e30]])
    torch.testing.assert_close(kernels.gate(activation)(gate_up), wanted, atol=1e-5, rtol=1e-6)


def test_an_activation_that_is_not_known_has_no_kernel(kernels):
    assert kernels.gate("relu") is None


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("width", [2, 6, 64, 80])
def test_rotation_of_heads_inside_a_merged_product(kernels, width, tokens):
    merged = torch.randn(tokens, 7 * width)
    cos, sin = torch.randn(tokens, 1, width), torch.randn(tokens, 1, width)
    heads, before = merged[:, width : 5 * width].unflatten(-1, (-1, width)), merged.clone()
    wanted = apply_rotary(heads.double(), cos.double(), sin.double())
    kernels.rotary()(heads, cos, sin)
    assert_close(heads, wanted)
    assert torch.equal(merged[:, :width], before[:, :width]) and torch.equal(
        merged[:, 5 * width :], before[:, 5 * width :]
    )


def test_layers_take_the_kernels_and_answer_as_before(kernels):
    model = nn.ModuleDict({"norm": RMSNorm(24, 1e-5, torch.float32), "mlp": GatedMLP(24, 40, False, torch.float32)})
    for parameter in model.parameters():
        parameter.data.normal_()
    x = torch.randn(3, 24)
    wanted = model["mlp"](model["norm"](x))
    take_kernels(model, kernels)
    assert model["norm"].kernel is not None and model["mlp"].kernel is not None
    torch.testing.assert_close(model["mlp"](model["norm"](x)), wanted, rtol=1e-4, atol=1e-4)


def test_layers_of_two_bytes_do_without(kernels):
    norm = RMSNorm(24, 1e-5, torch.bfloat16)
    norm.weight.data.normal_()
    take_kernels(norm, kernels)
    assert norm(torch.randn(3, 24).bfloat16()).dtype == torch.bfloat16
