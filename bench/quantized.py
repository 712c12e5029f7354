"""How much faster a Llama decodes when its weights are small, by format: own time of one thread, beside float32's.

    python bench/quantized.py [--layers 8] [--steps 48] [--only awq] [--only Q4_K]

The model is made here, of 1,024 inputs and 2,816 in its MLP, with random weights: time does not depend on them. Every
format is timed step by step in turn with float32, at 1 and at 4 requests; the quarter of each one's steps that took
longest counts for nothing, since that is what other processes cost.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch; its own time is then one thread's

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core import LLM
from core.bench.offline import greedy_params
from core.contracts import QuantizeSettings
from core.plugins import PluginHost
from core.request import ClientRequest
from core.testing import packed_checkpoint, tiny_checkpoint

HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 1024, 2816, 16, 4, 4096
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "head_dim": HIDDEN // HEADS,
    "max_position_embeddings": 512,
}
LAYER = {
    "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 4, HIDDEN), "attn_v": (HIDDEN // 4, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}  # fmt: skip
HALVES = {  # where the float16 scales of a block are, and what they are here
    "Q4_0": {0: 0.02}, "Q4_1": {0: 0.02, 2: -0.15}, "Q5_0": {0: 0.01}, "Q5_1": {0: 0.01, 2: -0.15}, "Q8_0": {0: 1e-3},
    "Q2_K": {80: 0.005, 82: 0.01}, "Q3_K": {108: 0.001}, "Q4_K": {0: 1e-4, 2: 1e-3}, "Q5_K": {0: 1e-4, 2: 1e-3},
    "Q6_K": {208: 1e-4}, "IQ4_NL": {0: 1e-3}, "IQ4_XS": {0: 1e-5},
}  # fmt: skip
MADE = ("awq", "gptq", "gptq-act-order", "gptq-8", "int4", "int8", "bnb-nf4", "bnb-int8")
ON_THE_FLY = ("--quantization int4", "--quantization int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=48, help="of decoding, for each number of requests")
    parser.add_argument("--only", action="append", help="a format; may be given several times")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| format | 1 request, ms a step | times float32 | 4 requests, ms a step | times float32 |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        source = tiny_checkpoint("llama", Path(scratch, "float32"), 1 << 30, num_hidden_layers=options.layers, **SIZES)
        with served(source) as floats:
            for name in options.only or (*MADE, *ON_THE_FLY, *HALVES):
                with served(*made(name, source, Path(scratch, name), options.layers)) as small:
                    print(row(name, floats, small, options.steps), flush=True)


def served(model: Path, quantization: str | None = None) -> LLM:
    return LLM(
        model=str(model), quantization=quantization, dtype="float32", device="cpu", skip_tokenizer_init=True,
        max_model_len=512, block_size=16, num_blocks=160, enable_prefix_caching=False,
    )  # fmt: skip


def row(name: str, floats: LLM, small: LLM, steps: int) -> str:
    cells = []
    for requests in (1, 4):
        plain, fast = in_turn((floats, small), requests, steps)
        cells += [f"{fast * 1e3:.2f}", f"{plain / fast:.2f}"]
    return f"| {name} | {' | '.join(cells)} |"


numbers = itertools.count()


def in_turn(models: tuple[LLM, LLM], requests: int, steps: int) -> list[float]:
    """Return the seconds of own time that a decoding step of each model takes."""
    engines = [model._engine for model in models]
    for engine in engines:
        for request in range(requests):
            prompt = [3 + (7 * i + request) % 4000 for i in range(16)]
            engine.add(ClientRequest(f"{next(numbers)}", prompt, greedy_params(steps + 2)))
        engine.step()  # the prompts
        engine.step()
    taken: list[list[float]] = [[], []]
    for _ in range(steps):
        for engine, found in zip(engines, taken, strict=True):
            start = time.thread_time()
            engine.step()
            found.append(time.thread_time() - start)
    for engine in engines:
        while engine.has_work:
            engine.step()
    return [fmean(sorted(found)[: len(found) * 3 // 4]) for found in taken]


# ------------------------------------------------------------------------------------------------ checkpoints


def made(name: str, source: Path, folder: Path, layers: int) -> tuple[Path, str | None]:
    """Return a model in a format, and what to make of it on the fly."""
    if name in ON_THE_FLY:
        return source, name.removeprefix("--quantization ")
    if name in HALVES:
        return gguf_file(name, folder.with_suffix(".gguf"), layers), None
    pack, config = packer(name)
    return packed_checkpoint(source, folder, config, _linears_only(pack)), None


def _linears_only(pack: Callable[[Tensor], Mapping[str, Tensor]]) -> Callable[[str, Tensor], Any]:
    def packed(name: str, weight: Tensor) -> Mapping[str, Tensor] | None:
        return pack(weight.float()) if name.endswith("_proj.weight") else None

    return packed


def packer(name: str) -> tuple[Callable[[Tensor], Mapping[str, Tensor]], Mapping[str, Any]]:
    """Rounding to nearest, by the quantizers that `core-serve quantize` takes; groups of 128."""
    if name == "gptq-8":
        return _gptq_8, {"quant_method": "gptq", "bits": 8, "group_size": 128, "desc_act": False}
    method = name.partition("-act-order")[0]
    grouped = not name.startswith("bnb")
    settings = QuantizeSettings(group_size=128 if grouped else None, desc_act=True if method != name else None)
    quantizer: Any = PluginHost.load().quantizer(method, settings)

    def pack(weight: Tensor) -> Mapping[str, Tensor]:
        layer = type("Layer", (), {"linears": {"x": _holding(weight)}, "input_groups": lambda self: [], "name": "x"})
        found: Mapping[str, Tensor] = quantizer.quantize_layer(layer())["x"]
        if method == name:
            return found
        order = torch.randperm(weight.shape[1])
        return {**found, "g_idx": (order // 128).int()}

    return pack, quantizer.config(["lm_head"])


def _holding(weight: Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


def _gptq_8(weight: Tensor) -> Mapping[str, Tensor]:
    out, width = weight.shape
    groups = weight.unflatten(1, (-1, 128))
    scales = groups.abs().amax(-1) / 127
    codes = ((groups / scales[..., None]).round() + 128).to(torch.uint8).flatten(1)
    return {
        "qweight": codes.view(torch.int32).T.contiguous(),
        "qzeros": torch.full((width // 128, out // 4), 0x7F7F7F7F, dtype=torch.int32),
        "scales": scales.T.half().contiguous(),
        "g_idx": (torch.arange(width) // 128).int(),
    }


def gguf_file(kind: str, path: Path, layers: int) -> Path:
    """Write a model whose layers' matrices are random blocks of one type; embedding and head are float32."""
    import gguf

    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    for key, value in _metadata(layers):
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{key}", value)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    embedding = rng.standard_normal((VOCAB, HIDDEN), np.float32) * HIDDEN**-0.5
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, embedding)
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    for layer in range(layers):
        for name, (out, inputs) in LAYER.items():
            raw = rng.integers(0, 256, (out, inputs // size, width), np.uint8)
            for start, scale in HALVES[kind].items():
                raw[..., start : start + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
            blocks = raw.reshape(out, -1)
            writer.add_tensor(f"blk.{layer}.{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(layers: int) -> Iterator[tuple[str, int | float]]:
    yield from {
        "block_count": layers,
        "context_length": 512,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }.items()


if __name__ == "__main__":
    main()
