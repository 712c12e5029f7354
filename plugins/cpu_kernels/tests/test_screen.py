"""A screened head finds the very logits that are highest, whatever weights and inputs, and no other reaches them."""

import pytest
import torch

from core.layers import AffineTensor, HalfTensor, Linear, pack_linears, screen_of

pytest.importorskip("core_cpu_kernels", reason="not installed where there is no C++ compiler")
from core_cpu_kernels import screen
from core_cpu_kernels.kernels import CpuKernels
from core_cpu_kernels.library import instruction_sets

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = [1, 2, 3, 4, 5, 8, 13, 16, 33, 64]


@pytest.fixture(autouse=True)
def small_weights_are_worth_it(monkeypatch):
    monkeypatch.setattr(screen, "LEAST_NUMBERS", 0)


@pytest.fixture(params=[name for name in instruction_sets() if name != "plain"])
def kernels(request):
    return CpuKernels(request.param)


def check(kernels, weight, x, bias=None):
    """Compare a screen with its linear; return the share of logits that were computed exactly."""
    linear = kernels.linear(weight, bias)
    highest = kernels.highest(linear)
    assert highest is not None
    wanted, given = linear(x), highest(x)
    top = wanted.amax(-1, keepdim=True)
    assert torch.equal(given == top, wanted == top)
    assert (given <= top).all()
    slack = x.norm(dim=-1, keepdim=True) * weight.float().norm(dim=-1)
    assert ((given - wanted).abs() <= 0.1 * slack + 1e-30).all()
    return (given == wanted).float().mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_the_highest_of_each_row_is_what_the_linear_gives(kernels, rows, dtype):
    torch.manual_seed(rows)
    out, size = 5003, 16 * int(torch.randint(1, 30, ()))
    weight = torch.randn(out, size).to(dtype)
    check(kernels, weight, torch.randn(rows, size))
    share = check(kernels, weight, torch.randn(rows, size) + 2 * weight[torch.randint(out, (rows,))].float())
    assert size < 200 or share < 0.5  # most were ruled out


@pytest.mark.parametrize("out", [1, 7, 8, 16, 17, 1023, 1024, 1025])
def test_any_number_of_outputs_fits(kernels, out):
    check(kernels, torch.randn(out, 64), torch.randn(5, 64))


def test_logits_that_are_equal_stay_equal(kernels):
    weight = torch.randn(1, 96).repeat(3000, 1)
    weight[::3] += 1e-3 * torch.randn(1000, 96)
    check(kernels, weight, torch.randn(9, 96))


def test_what_bytes_leave_out_is_counted_where_all_of_it_points_one_way(kernels):
    size = 256
    signs = torch.randn(size).sign()
    codes = torch.randint(-100, 100, (2000, size)).float()
    codes[700] = codes[1400] = signs * torch.randint(50, 100, (size,))
    codes[1400, 1::3] += signs[1::3]  # a third of a byte for each column
    codes[:, 0] = 127  # so that a byte is worth 1
    rests = torch.zeros_like(codes)
    rests[700, 1:] = 0.45 * signs[1:]
    weight = codes + rests
    assert (weight @ signs).argmax() == 700
    check(kernels, weight, signs.repeat(3, 1) * torch.tensor([[1.0], [0.01], [300.0]]))


def test_one_number_that_drowns_the_others_hides_nothing(kernels):
    weight, x = torch.randn(4000, 128), torch.randn(6, 128)
    x[:, 3], weight[:, 9] = 3e4, 50.0
    check(kernels, weight, x)
    check(kernels, torch.cat([weight, weight.sign() * 1e4]), x.sign() * 1e6)  # all products point one way


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1.0, 1e15])
def test_small_and_large_numbers_are_told_apart(kernels, size):
    check(kernels, torch.randn(3000, 64) * size, torch.randn(5, 64))
    check(kernels, torch.randn(3000, 64), torch.randn(5, 64) * size)


def test_zeros_are_numbers_like_others(kernels):
    weight, x = torch.randn(3000, 64), torch.randn(5, 64)
    weight[5::7], x[2] = 0, 0
    check(kernels, weight, x)


def test_a_bias_counts(kernels):
    check(kernels, torch.randn(3001, 64), torch.randn(5, 64), bias=3 * torch.randn(3001))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_spoils_no_other(kernels, broken):
    linear = kernels.linear(torch.randn(3000, 64), None)
    x = torch.randn(5, 64)
    x[1, 7] = broken
    wanted, given = linear(x), kernels.highest(linear)(x)
    assert torch.equal(wanted.amax(-1).isfinite(), given.amax(-1).isfinite())
    others = [0, 2, 3, 4]
    assert torch.equal(wanted[others].argmax(-1), given[others].argmax(-1))


def test_more_rows_than_are_worth_it_are_multiplied(kernels):
    linear = kernels.linear(torch.randn(300, 64), None)
    x = torch.randn(screen.MOST_ROWS + 1, 64)
    assert torch.equal(kernels.highest(linear)(x), linear(x))


def test_one_thread_finds_what_two_find(kernels):
    weight, x, before = torch.randn(9000, 64), torch.randn(7, 64), torch.get_num_threads()
    highest, found = kernels.highest(kernels.linear(weight, None)), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(highest(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_only_weights_of_floats_that_are_large_have_a_screen(kernels, monkeypatch):
    codes = AffineTensor(
        {"codes": torch.zeros(64, 64, dtype=torch.uint8), "scales": torch.ones(64, 2)},
        64, torch.float32, bits=8, group_size=32,
    )  # fmt: skip
    assert kernels.highest(kernels.linear(codes, None)) is None
    assert kernels.highest(kernels.linear(torch.randn(64, 40), None)) is None  # its columns are cut in 16
    monkeypatch.setattr(screen, "LEAST_NUMBERS", 64 * 64 + 1)
    assert kernels.highest(kernels.linear(torch.randn(64, 64), None)) is None


def test_vectors_of_four_have_no_screen():
    kernels = CpuKernels("plain")
    assert kernels.highest(kernels.linear(torch.randn(64, 64), None)) is None


def test_halves_that_stand_for_floats_are_screened_as_they_lie(kernels):
    model = torch.nn.Sequential(Linear(64, 3000, False, torch.float32))
    values = torch.randn(3000, 64).bfloat16()
    model[0].weight = torch.nn.Parameter(HalfTensor({"values": values}, 64, torch.float32), requires_grad=False)
    pack_linears(model, kernels=kernels)
    screened, x = screen_of(model[0], kernels), torch.randn(3, 64)
    assert torch.equal(screened.highest(x).argmax(-1), model(x).argmax(-1))
