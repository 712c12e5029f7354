"""A model of SmolLM2's size takes the memory of its file, also while it is loaded."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.slow
HIDDEN, INNER, LAYERS, VOCAB, GROUP = 576, 1536, 30, 49152, 64
MB = 2**20
KV, RUNTIME = 64 * MB, 400 * MB
MEASURE = """
import sys, psutil, threading, time
from core.config import EngineConfig
from core.engine_build import build_engine

process, peak, done = psutil.Process(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
options = {"device": "cpu", "kv_cache_memory": 64 << 20, "skip_tokenizer_init": True}
engine = build_engine(EngineConfig(sys.argv[1], sys.argv[2], **options))
done = True
watcher.join()
print(process.memory_info().rss, peak)
"""


def linear(name, rows, columns):
    return {
        f"{name}.qweight": torch.randint(-(2**31), 2**31 - 1, (columns, rows // 8), dtype=torch.int32),
        f"{name}.qzeros": torch.full((columns // GROUP, rows // 8), -0x77777778, dtype=torch.int32),
        f"{name}.scales": torch.full((columns // GROUP, rows), 0.01, dtype=torch.float16),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    tensors = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN).half() * 0.02}
    tensors["model.norm.weight"] = torch.ones(HIDDEN).half()
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for part, rows in {"q": HIDDEN, "k": HIDDEN // 3, "v": HIDDEN // 3, "o": HIDDEN}.items():
            tensors |= linear(f"{name}.self_attn.{part}_proj", rows, HIDDEN)
        for part in ("gate", "up"):
            tensors |= linear(f"{name}.mlp.{part}_proj", INNER, HIDDEN)
        tensors |= linear(f"{name}.mlp.down_proj", HIDDEN, INNER)
        for part in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{part}.weight"] = torch.ones(HIDDEN).half()
    save_file(tensors, folder / "model.safetensors")
    quantization = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "vocab_size": VOCAB,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 2048, "tie_word_embeddings": True, "quantization_config": quantization,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model_impl", ["native", "transformers"])
def test_memory_is_that_of_the_file(folder, model_impl):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, model_impl], capture_output=True, text=True, check=True
    )
    after, peak = map(int, done.stdout.split())
    limit = (folder / "model.safetensors").stat().st_size * 1.15 + KV + RUNTIME
    largest_layer = VOCAB * HIDDEN * 4
    assert after <= limit, f"{after / MB:.0f} MB after loading, {limit / MB:.0f} allowed"
    assert peak <= limit + largest_layer, f"{peak / MB:.0f} MB at most"
