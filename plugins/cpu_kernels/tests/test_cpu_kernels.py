"""Every kernel gives what decode-then-multiply gives, at any number of rows, whatever the instruction set."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from core.errors import CoreError
from core.layers import AffineTensor, HalfTensor, Linear, QuantizedTensor, TableTensor, pack_linears, unpack_linears

pytest.importorskip("core_cpu_kernels", reason="not installed where there is no C++ compiler")
import gguf

from core_cpu_kernels.kernels import CpuKernels
from core_cpu_kernels.library import instruction_sets

BOUND = 2e-6  # relative, by norm: what accumulation in float32 explains
BYTES_BOUND = 1e-4  # where x is brought to 16 bits for products of bytes
BYTES_ROWS = {"amx": 512, "avx512vnni": 512, "avx2": 512}  # up to which number of rows that is done at the most
ROWS = [1, 2, 3, 4, 5, 6, 7, 13, 23, 24, 33, 129, 512]
NF4 = (-1.0, -0.69, -0.52, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.24, 0.33, 0.44, 0.56, 0.72, 1.0)
HALVES_AT = {  # where a block keeps its scale and its min
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


BYTES_PACKINGS = ("affine4", "affine8", *(f"ggml:{kind}" for kind in HALVES_AT))


@pytest.fixture(params=instruction_sets())
def kernels(request):
    return CpuKernels(request.param)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def affine(bits, out, size, group, kind="zeros", dtype=torch.float16, order=False, seed=0):
    made = torch.Generator().manual_seed(seed)
    groups = size // group
    parts = {
        "codes": torch.randint(0, 256, (out, size * bits // 8), dtype=torch.uint8, generator=made),
        "scales": (torch.rand(out, groups, generator=made) * 0.02 + 0.001).to(dtype),
    }
    if kind == "zeros":
        parts["zeros"] = torch.randint(0, 1 << bits, (out, groups), dtype=torch.uint8, generator=made)
    if kind == "offsets":
        middle = parts["scales"].float() * (1 << (bits - 1))
        parts["offsets"] = (torch.randn(out, groups, generator=made) * 0.1 - middle).to(dtype)
    settings = {"order": torch.randperm(size, generator=made)} if order else {}
    return AffineTensor(parts, size, torch.float32, bits=bits, group_size=group, **settings)


def table(out, size, group, dtype=torch.float32):
    parts = {
        "codes": torch.randint(0, 256, (out, size // 2), dtype=torch.uint8),
        "scales": torch.rand(out, size // group).to(dtype),
    }
    return TableTensor(parts, size, torch.float32, group_size=group, table=NF4)


class GgmlTensor(QuantizedTensor):
    """Blocks of a GGUF file, decoded by the `gguf` package."""

    @property
    def packing(self):
        return f"ggml:{self.settings['kind']}"

    def decode(self):
        kind = gguf.GGMLQuantizationType[self.settings["kind"]]
        return torch.from_numpy(gguf.quants.dequantize(self.parts["blocks"].numpy(), kind)).float()


def ggml(kind, out, size, seed=0):
    """Random bytes, but for the halves that scale a block: those are small and of either sign."""
    columns, size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    made = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (out, size // columns, size_bytes), dtype=torch.uint8, generator=made)
    for at in HALVES_AT[kind]:
        scale = torch.randn(out, size // columns, 1, generator=made).mul(0.01).half()
        blocks[..., at : at + 2] = scale.view(torch.uint8)
    return GgmlTensor({"blocks": blocks.view(out, -1)}, size, torch.float32, kind=kind)


def assert_close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-4)


def bound_of(kernels, weight, rows):
    bytes_rows = BYTES_ROWS.get(kernels.library.instruction_set, 0)
    return BYTES_BOUND if rows <= bytes_rows and getattr(weight, "packing", None) in BYTES_PACKINGS else BOUND


def assert_right(kernels, weight, rows, bias=None):
    """Compare with float64; every row that the kernel was not asked for must stay as it was."""
    linear = kernels.linear(weight, bias)
    assert linear is not None
    floats = weight.decode() if hasattr(weight, "decode") else weight
    for count in rows:
        x = torch.randn(count, weight.shape[1], generator=torch.Generator().manual_seed(count))
        wanted = nn.functional.linear(x.double(), floats.double(), None if bias is None else bias.double())
        found = linear(x)
        assert found.shape == wanted.shape and found.dtype == torch.float32
        error, bound = (found.double() - wanted).norm() / wanted.norm(), bound_of(kernels, weight, count)
        assert error < bound, f"{count} rows: relative error {error:.2e}"
        worst = ((found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()
        assert worst < 3 * bound, f"{count} rows: one of them is off by {worst:.2e}"


@pytest.mark.parametrize("kind", ["zeros", "offsets", "middle"])
@pytest.mark.parametrize("bits", [4, 8])
def test_affine_weights_at_any_number_of_rows(kernels, threads, bits, kind):
    assert_right(kernels, affine(bits, 70, 576, 64, kind), ROWS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "size, group",
    [
        (8, 8),
        (40, 8),
        (72, 24),
        (96, 32),
        (136, 136),
        (160, 16),
        (192, 96),
        (576, 576),
        (1536, 128),
        (2112, 64),
        (640, 320),
    ],
)
def test_affine_weights_of_any_width_and_group(kernels, size, group, bits, dtype):
    for kind in ("zeros", "offsets", "middle"):
        assert_right(kernels, affine(bits, 19, size, group, kind, dtype), [1, 3, 9])


@pytest.mark.parametrize("bits", [4, 8])
def test_columns_in_another_order(kernels, bits):
    assert_right(kernels, affine(bits, 33, 192, 32, order=True), [1, 2, 17])


@pytest.mark.parametrize("size, group", [(64, 64), (72, 8), (576, 64), (1024, 128), (96, 96)])
def test_tables_of_16_values(kernels, size, group):
    for dtype in (torch.float32, torch.float16):
        assert_right(kernels, table(37, size, group, dtype), [1, 2, 6, 11, 40])


@pytest.mark.parametrize("kind", HALVES_AT)
def test_blocks_of_gguf_files(kernels, kind):
    for size in (256, 768) if kind.endswith(("_K", "_XS")) else (32, 64, 96, 576):
        assert_right(kernels, ggml(kind, 37, size), [1, 2, 3, 4, 5, 11, 40])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 7, 64, 100, 577, 2200])
def test_floats_are_multiplied_as_they_lie(kernels, size, dtype):
    assert_right(kernels, torch.randn(43, size, generator=torch.Generator().manual_seed(1)).to(dtype), [1, 4, 7, 65])


@pytest.mark.parametrize("rows", [16, 300])
def test_more_rows_and_columns_than_a_block_has(kernels, rows):
    made = torch.Generator().manual_seed(2)
    weights = [affine(4, 37, 5120, 64), affine(8, 37, 5120, 32, order=True), torch.randn(37, 5120, generator=made)]
    for weight in [*weights, ggml("Q4_1", 37, 5120), ggml("Q8_0", 37, 5120), ggml("Q5_K", 37, 5120)]:
        assert_right(kernels, weight, [rows], bias=torch.randn(37, generator=made))


def test_rows_do_not_depend_on_those_beside_them(kernels):
    """16 rows and 20: the same loops, and the same bits."""
    x = torch.randn(20, 576, generator=torch.Generator().manual_seed(3))
    for weight in (affine(4, 70, 576, 64), ggml("Q4_1", 70, 576), torch.randn(70, 576)):
        linear = kernels.linear(weight, None)
        both = [linear(x[torch.tensor(order)])[-1] for order in (range(20), [*range(19, -1, -1)][:19] + [19])]
        assert torch.equal(*both)


# ---- products of bytes: what is unusual about an x costs no more than the stated error, and stays where it is

OUT, SIZE = 37, 768
FEW = (1, 3, 4, 19)


@pytest.fixture(params=BYTES_PACKINGS)
def weight(request):
    if request.param.startswith("ggml:"):
        return ggml(request.param.removeprefix("ggml:"), OUT, SIZE)
    return affine(int(request.param.removeprefix("affine")), OUT, SIZE, 64)


def numbers(rows):
    return torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(rows))


def assert_exact_enough(kernels, weight, change):
    """Row by row, in float64, for every few rows of numbers that `change` has changed where they are."""
    linear, floats = kernels.linear(weight, None), weight.decode().double()
    for rows in FEW:
        x = numbers(rows)
        change(x)
        wanted = x.double() @ floats.T
        error = ((linear(x).double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()
        assert error < 3 * bound_of(kernels, weight, rows), f"{rows} rows: {error:.2e}"


def test_an_outlier_leaves_columns_beyond_its_block_as_exact_as_they_were(kernels):
    """The weights of its own 128 columns are zeros, so that the answer is that of the others."""
    weight = affine(4, OUT, SIZE, 64)
    weight.parts["scales"][:, 2:4] = 0
    assert_exact_enough(kernels, weight, lambda x: x[:, 130].fill_(1e6))


def test_very_large_and_very_small_numbers(kernels, weight):
    for size in (1e30, 1e-30):
        assert_exact_enough(kernels, weight, lambda x, size=size: x.mul_(size))


def test_blocks_of_very_different_size_in_one_row(kernels, weight):
    def change(x):
        x[:, :128] *= 1e20
        x[:, 128:256] *= 1e-30
        x[:, 256:384] = 0

    assert_exact_enough(kernels, weight, change)


def test_zeros_give_the_bias_and_denormal_numbers_what_rounds_to_it(kernels, weight):
    bias = torch.randn(OUT)
    linear = kernels.linear(weight, bias)
    for rows in FEW:
        for value in (0.0, 1e-40, -1e-44):
            assert torch.equal(linear(torch.full((rows, SIZE), value)), bias.expand(rows, -1))


def test_what_is_not_finite_spoils_its_own_row_and_no_other(kernels, weight):
    linear, floats = kernels.linear(weight, None), weight.decode().double()
    for rows in FEW:
        wanted, others = numbers(rows).double() @ floats.T, torch.arange(rows) != rows // 2
        for value in (torch.inf, -torch.inf, torch.nan):
            x = numbers(rows)
            x[rows // 2, 400] = value
            found = linear(x)
            assert not found[rows // 2].isfinite().any()
            assert (found[others].double() - wanted[others]).norm() <= BYTES_BOUND * wanted.norm()


def test_the_largest_codes_and_numbers_do_not_overflow(kernels):
    """255 * 127 * 257 in each of 128 columns that share a scale: half of what 31 bits hold."""
    weight = affine(8, OUT, SIZE, 128, "offsets", torch.float32)
    weight.parts["codes"].fill_(255)
    weight.parts["offsets"].zero_()
    for value in (3.0, -3.0):
        assert_exact_enough(kernels, weight, lambda x, value=value: x.fill_(value))


def test_a_last_vector_of_outputs_may_overlap_the_one_before_it(kernels):
    for out in (15, 16, 17, 31, 33):
        for kind in ("Q4_1", "Q8_0"):
            assert_right(kernels, ggml(kind, out, 576), [1, 5, 11], bias=torch.randn(out))


# ---- all kernels


def test_a_subnormal_an_infinite_and_a_nan_half_stay_what_they_are(kernels):
    values = torch.tensor([6e-8, -6e-5, float("inf"), float("nan"), -0.0, 65504.0]).half()
    for rows in (1, 2, 8):
        found = kernels.linear(values[:, None].contiguous(), None)(torch.ones(rows, 1))
        torch.testing.assert_close(found, values.float().expand(rows, -1), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_bias_is_added_once(kernels, rows):
    assert_right(kernels, affine(4, 45, 2304, 64), [rows], bias=torch.randn(45))


def test_what_lies_beyond_a_row_is_never_used(kernels):
    """Scales of other rows are NaN, and so are the bytes behind the last one."""
    whole = affine(4, 3, 72, 8, dtype=torch.float32)
    for name in ("codes", "scales", "zeros"):
        whole.parts[name][[0, 2]] = torch.nan if name == "scales" else 255
    assert_right(kernels, whole[1:2], [1, 2, 9])


def test_nan_in_other_rows_of_floats_is_never_used(kernels):
    whole = torch.randn(11, 70)
    whole[[0, 10]] = torch.nan
    assert_right(kernels, whole[1:10], [1, 3, 14])


def test_output_of_one_weight_row_and_of_thousands(kernels, threads):
    for out in (1, 2, 31, 32, 33, 3001):
        assert_right(kernels, affine(8, out, 64, 32), [1, 2, 8])


def test_shapes_and_dtypes_of_x(kernels):
    weight = affine(4, 24, 64, 32)
    linear, x = kernels.linear(weight, None), torch.randn(2, 3, 64)
    wanted = nn.functional.linear(x, weight.decode())
    assert_close(linear(x), wanted)
    assert_close(linear(x.transpose(0, 1)), wanted.transpose(0, 1))
    assert_close(linear(x[0, 0]), wanted[0, 0])
    assert linear(x[:0]).shape == (0, 3, 24)
    for dtype in (torch.float16, torch.bfloat16):
        assert linear(x.to(dtype)).dtype == dtype
        torch.testing.assert_close(linear(x.to(dtype)), wanted.to(dtype), rtol=2e-2, atol=2e-2)
    with pytest.raises(CoreError, match=r"takes \[\.\.\., 64\]"):
        linear(torch.randn(2, 63))
    with pytest.raises(CoreError, match=r"not torch\.int64"):
        linear(torch.ones(2, 64, dtype=torch.int64))


def test_what_has_no_kernel_is_declined(kernels):
    assert kernels.linear(torch.randn(4, 8).double(), None) is None
    assert kernels.linear(torch.randn(2, 4, 8).half(), None) is None
    assert kernels.linear(torch.randn(8, 8).half().T, None) is None  # not row after row
    assert kernels.linear(affine(4, 4, 12, 4), None) is None  # groups that are no whole words


def test_a_function_outlives_the_weight_it_came_from_and_copies_share_it(kernels):
    weight, x = affine(4, 24, 64, 32), torch.randn(3, 64)
    wanted = nn.functional.linear(x, weight.decode())
    linear = copy.deepcopy(kernels.linear(weight, None))
    del weight
    assert_close(linear(x), wanted)


def test_modules_get_their_kernels(kernels):
    model = nn.Sequential(Linear(64, 24, True, torch.float32))
    model[0].weight = nn.Parameter(affine(4, 24, 64, 32), requires_grad=False)
    model[0].bias.data.normal_()
    x, weight = torch.randn(5, 64), model[0].weight
    wanted = nn.functional.linear(x, weight.decode(), model[0].bias)
    pack_linears(model, kernels=kernels)
    with torch.inference_mode():
        assert_close(model(x), wanted)
    assert model[0].weight.parts["codes"].data_ptr() == weight.parts["codes"].data_ptr()


def test_the_command_lists_the_plugin_and_goes_on_without_it():
    def plugins(*options):
        run = [sys.executable, "-c", "from core.cli import main; main()", "plugins", *options]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout

    assert "core-serve-cpu-kernels" in plugins()
    assert "core-serve-cpu-kernels" not in plugins("--disable-plugin", "cpu_kernels")


def test_a_quantized_model_says_the_same_with_and_without_kernels(tmp_path):
    """On the fly 8 bit, natively: the linears are 64 and 128 wide, with groups of the whole row."""
    pytest.importorskip("core_quant_int", reason="makes the 8 bit weights")
    from core import LLM, SamplingParams
    from core.testing import tiny_checkpoint

    path, prompts = tiny_checkpoint("llama", tmp_path), [[5, 6, 7, 8], [9, 10, 11]]
    options = {"model": str(path), "quantization": "int8", "skip_tokenizer_init": True}
    found = []
    for disabled in ([], ["cpu_kernels"]):
        with LLM(**options, disable_plugins=disabled) as llm:
            outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
        found.append([output.outputs[0].token_ids for output in outputs])
    assert found[0] == found[1]


@pytest.mark.parametrize("rows", [1, 4, 7, 12, 33, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_float32_weights_that_are_widened_halves_are_kept_in_two_bytes(instruction_set, dtype, rows):
    """But in the set whose vectors of four oneDNN's own code beats."""
    kernels = CpuKernels(instruction_set)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(200, 400), nn.Linear(400, 24, bias=False)), torch.randn(rows, 200)
    for part in model:
        part.weight.data = part.weight.data.to(dtype).float()
    weight = model[0].weight.detach().clone()
    with torch.inference_mode():
        wanted = model(x)
        pack_linears(model, kinds=(nn.Linear,), kernels=kernels)
        kept = [isinstance(part.weight, HalfTensor) for part in model]
        assert kept == [kernels.takes_float32, False]  # the second is too small to matter
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)
        unpack_linears(model)
        assert torch.equal(torch.eye(200) @ model[0].weight.T, weight.T)
