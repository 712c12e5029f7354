"""A quantized model takes the memory of its file: what a fresh process holds after an answer, and at most before."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.real
IMPLS = ("native_llama", "transformers")
MB = 1024**2
RUNTIME = 400 * MB  # Python, torch, transformers, the tokenizer
# Triton, where it is installed, is imported by torch and takes 70 MB; a machine without a GPU needs none.
MEASURE = """
import json, sys
sys.modules["triton"] = None
from core.llm import LLM
from core.sampling_params import SamplingParams
from core.verify_layers import decoder_layers, modules_of
llm = LLM(model=sys.argv[1], model_impl=sys.argv[2], max_model_len=512, block_size=16, num_blocks=64)
llm.generate([list(range(3, 24))], SamplingParams(temperature=0, max_tokens=8))
stated = dict(line.split(":", 1) for line in open("/proc/self/status"))
model = llm._engine.model
cache = sum(64 * 16 * spec.num_kv_heads * (spec.k_dim + spec.v_dim) * spec.dtype.itemsize for spec in model.kv_specs())
layers = next(found for module in modules_of(model) if (found := decoder_layers(module))).layers
layer = max(sum(weight.numel() * 4 for weight in layer.parameters()) for layer in layers)
now, peak = (int(stated[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
print(json.dumps({"now": now, "peak": peak, "cache": cache, "layer": layer}))
"""


def assert_small(model, impl):
    """At most 1.15 times the file, the K/V cache and the runtime; while loading, one layer's floats more."""
    run = subprocess.run([sys.executable, "-c", MEASURE, str(model), impl], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    files = [model] if model.is_file() else list(model.glob("*.safetensors"))
    bound = 1.15 * sum(file.stat().st_size for file in files) + found["cache"] + RUNTIME
    shown = {name: round(size / MB) for name, size in {**found, "bound": bound}.items()}
    print(model.name, impl, shown)
    assert found["now"] <= bound, shown
    assert found["peak"] <= bound + found["layer"], shown


@pytest.mark.parametrize("impl", IMPLS)
def test_a_checkpoint_made_here_takes_the_memory_of_its_files(method, impl, make):
    assert_small(make(method), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gguf_file_takes_the_memory_of_the_file(impl, gguf_file):
    assert_small(gguf_file, impl)


@pytest.mark.parametrize("impl", ["auto", "transformers"])
def test_another_checkpoint_takes_the_memory_of_its_files(another, impl):
    assert_small(another, impl)
