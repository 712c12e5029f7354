"""Time attention in place against torch's own and against what memory and sgemm allow.

    python plugins/cpu_kernels/bench_attention.py [--heads 9x3x64] [--isa avx2] [--threads 2] [--cache bfloat16]

Heads are query heads x K/V heads x their width. Milliseconds a layer, the fastest call; with one thread its own time,
otherwise the clock's. Layers take turns, up to 30 of them, so that K and V of all but short contexts come from memory.
Blocks of 16 tokens stand in random order, as in a pool long in use, or with --in-order as in a new one. "share" of
decode: the bytes of K and V a second, of what a sum over memory reads; of prefill: the multiply-adds of what is seen,
of what sgemm computes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from core.attention.cpu import CpuAttention
from core.batch import Batch, Places
from core.contracts import AttentionArgs, AttentionBackend, KVSpec
from core_cpu_kernels.attention import CpuKernelAttention

BLOCK = 16
DECODE = (128, 512, 1024, 2048, 4096, 8192)  # tokens of context
PREFILL = (512, 4096)  # tokens
WORKING_SET = 192 << 20  # bytes of K and V that a round goes through, several times the last-level cache's
clock = time.perf_counter


def best_ms(run: Callable[[], object], seconds: float) -> float:
    """Return the fastest call, which a busy machine disturbs least."""
    run()
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < end:
        start = clock()
        run()
        taken.append(clock() - start)
    return min(taken) * 1e3


def read_bandwidth(seconds: float) -> float:
    """Bytes a second: a sum over 256 MiB of float32."""
    data = torch.ones(64 << 20)
    return data.nbytes / best_ms(data.sum, seconds) * 1e3


def sgemm_flops(seconds: float) -> float:
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / best_ms(lambda: a @ a, seconds) * 1e3


def make_batch(requests: int, context: int, new: int, in_order: bool) -> tuple[Batch, int]:
    """Return a step of equal requests, and how many blocks they take."""
    blocks = -(-context // BLOCK)
    order = torch.arange(requests * blocks) if in_order else torch.randperm(requests * blocks)
    tables = order.view(requests, blocks)
    at = torch.arange(context - new, context)
    slots = (tables[:, at // BLOCK] * BLOCK + at % BLOCK).flatten()
    begun = slots[slots % BLOCK == 0] // BLOCK
    batch = Batch(
        scheduled=(),
        token_ids=torch.zeros(len(slots), dtype=torch.int64),
        positions=at.repeat(requests),
        everything=Places(slots, tables, begun if len(begun) else None),
        query_starts=list(range(0, len(slots) + 1, new)),
        context_lens=[context] * requests,
        logit_rows=torch.zeros(0, dtype=torch.int64),
        attention=None,
    )
    return batch, requests * blocks


def layer_ms(backend: AttentionBackend, spec: KVSpec, heads: int, step_of: tuple[Batch, int], seconds: float) -> float:
    batch, blocks = step_of
    size = blocks * BLOCK * spec.num_kv_heads * (spec.k_dim + spec.v_dim) * spec.dtype.itemsize
    layers = max(1, min(30, WORKING_SET // size))
    backend.allocate([spec] * layers, [blocks] * layers, BLOCK)
    if isinstance(backend, CpuKernelAttention):
        backend.layers[0].cache.normal_()  # all layers lie in it
    elif isinstance(backend, CpuAttention):
        for memory in (*backend.cache.keys, *backend.cache.values):
            memory.normal_()
    backend.plan(batch)
    q = torch.randn(batch.num_tokens, heads, spec.k_dim)
    k, v = (torch.randn(batch.num_tokens, spec.num_kv_heads, spec.k_dim) for _ in range(2))
    args = AttentionArgs(spec.k_dim**-0.5)

    def step() -> None:
        for layer in range(layers):
            backend.attend(q, k, v, layer, args)

    return best_ms(step, seconds) / layers


def sdpa_ms(spec: KVSpec, heads: int, tokens: int, seconds: float) -> float:
    q, k, v = (torch.randn(1, n, tokens, spec.k_dim) for n in (heads, spec.num_kv_heads, spec.num_kv_heads))
    return best_ms(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", default="9x3x64", help="query heads x K/V heads x width")
    parser.add_argument("--isa", default=None, help="avx512, avx2 or plain")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--in-order", action="store_true", help="blocks follow each other in memory")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each number")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.threads == 1:  # then the thread's own time is all there is, and other processes do not count
        global clock
        clock = time.thread_time
    heads, kv_heads, dim = (int(part) for part in options.heads.split("x"))
    spec = KVSpec("layer", kv_heads, dim, dim, getattr(torch, options.cache))
    ours, seconds = lambda: CpuKernelAttention(options.isa), options.seconds
    bandwidth, flops = read_bandwidth(seconds), sgemm_flops(seconds)
    print(f"{ours().library.instruction_set}, {options.threads} threads; reading {bandwidth / 1e9:.1f} GB/s,", end=" ")
    print(f"sgemm {flops / 1e9:.0f} GFLOP/s; {heads} heads on {kv_heads} of {dim}, cache in {options.cache}")
    token_bytes = kv_heads * 2 * dim * spec.dtype.itemsize
    with torch.inference_mode():
        print(f"\n{'decode':>8}{'context':>9}{'ours':>9}{'a token, us':>13}{'share':>7}{'gathered':>10}")
        for requests in (1, 8):
            for context in DECODE:
                step_of = make_batch(requests, context, 1, options.in_order)
                found = layer_ms(ours(), spec, heads, step_of, seconds)
                gathered = layer_ms(CpuAttention(), spec, heads, step_of, seconds)
                share = requests * context * token_bytes / found * 1e3 / bandwidth
                each = found * 1e3 / requests
                print(f"{requests:8}{context:9}{found:9.3f}{each:13.1f}{share:7.0%}{gathered:10.3f}", flush=True)
        print(f"\n{'prefill':>17}{'ours':>9}{'share':>20}{'sdpa':>10}")
        for tokens in PREFILL:
            found = layer_ms(ours(), spec, heads, make_batch(1, tokens, tokens, options.in_order), seconds)
            share = 4 * heads * dim * (tokens * (tokens + 1) // 2) / found * 1e3 / flops
            sdpa = sdpa_ms(spec, heads, tokens, seconds)
            print(f"{tokens:17}{found:9.3f}{share:20.0%}{sdpa:10.3f}", flush=True)


if __name__ == "__main__":
    main()
