"""Kernels are compiled for GPUs that are not here, and what does not fit one is named."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'core-serve[gpu]'")


def compiled(*arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = "import sys; from core.cli import run; sys.exit(run(['kernels', 'compile', *sys.argv[1:]]))"
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=clean | environment)


def test_a_selection_fits_two_targets():
    done = compiled(
        "--targets", "sm_90,gfx942", "--models", "Mistral-7B", "--json",
        "--kernels", "paged_decode,write_kv",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert {(one["target"], one["kernel"]) for one in found} == {
        (target, kernel) for target in ("sm_90", "gfx942") for kernel in ("paged_decode", "write_kv")
    }
    for one in found:
        assert one["models"] == ["Mistral-7B"]
        assert one["compiled"]["registers"] > 0
        assert one["compiled"]["spills"] == 0
        assert one["compiled"]["wide_loads"] > 0
        assert (one["compiled"]["tensor_cores"] > 0) == (one["kernel"] == "paged_decode")


def test_what_is_unknown_is_named():
    done = compiled("--targets", "sm_91")
    assert done.returncode == 1
    assert "target 'sm_91' is unknown; there are gfx90a, gfx942, sm_100" in done.stderr


def test_an_interpreting_process_does_not_compile():
    done = compiled("--targets", "sm_90", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "TRITON_INTERPRET" in done.stderr


UNFIT = """
import torch
from core.contracts import AttentionArgs
from core.kernels.attention_call import PagedCall, Tile
from core.kernels.chip import RecordingChip, TARGETS
from core.kernels.compile import compile_launch
from core.kernels.paged_decode import paged_decode
from core.kernels.survey import problems_of

def empty(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")

chip = RecordingChip(TARGETS["gfx942"])
cache = empty(99, 16, 1, 256)
ints = empty(9, dtype=torch.int32)
call = PagedCall(cache, cache, empty(8, 9, dtype=torch.int32), ints, ints[:8], Tile(256, 128, 1, 2))
paged_decode(empty(8, 256, 256), empty(8, 256, 256), call, ints[:8], 1, AttentionArgs(1.0), chip)
for launch in chip.launches:
    print("; ".join(problems_of(launch, compile_launch(launch, chip.target), chip.target)))
"""


def test_a_tile_that_is_too_large_is_found_out():
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", UNFIT], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    assert "spills" in done.stdout
    assert "shared memory" in done.stdout


ROTARY = """
import torch, triton
from triton.backends.compiler import GPUTarget
from core.kernels.chip import RecordingChip, TARGETS
from core.kernels.compile import ast_source
from core.kernels.rotary import rotary

chip = RecordingChip(TARGETS["sm_90"])
x, angles = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((5, 8, 128), (5, 64)))
rotary(x, angles, angles, x, chip=chip)
for launch in chip.launches:
    options = launch.options(chip.target)
    print(triton.compile(ast_source(launch), target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


def test_rotary_rounds_its_products_before_it_adds_them():
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", ROTARY], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    assert "mul." in done.stdout
    assert "fma." not in done.stdout
