"""Draw one token a row: temperature, top-k, top-p and min-p, with a random number that depends on the request alone.

Tokens are thought of in falling order of their logits, equal ones by rising id. With weights w = e^((x - best) / T):

    top-k   keeps the first k                                    (all, if k is the vocabulary)
    top-p   keeps those before which less than p of the mass lies that top-k left
    min-p   keeps those with w >= min_p
    draw    the first whose running sum of kept weights passes uniform(seed, step) * their sum
    T = 0   the first of all

Nothing is sorted: each step looks for the logit at which a count or a sum passes its goal, by halving the range of
float32 seen as ordered integers, at most 32 passes; ties at that logit are counted. What lies above the least of the
row's CANDIDATES highest logits is counted among them, which is nearly every pass; the others read the whole row. Top-p:
Holtzman et al. 2020; min-p: Nguyen et al. 2024; the random number is splitmix64 (Steele, Lea, Flood 2014) of seed and
step.

logits [rows, vocab]; temperature, top_p, min_p [rows] float64; top_k [rows] int32; seeds, steps, out [rows] int64
One program a row; sums in float64. Registers: BLOCK / threads logits and sums. Shared memory: a few floats, for sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.kernels.checks import FLOATS, check, pow2
from core.kernels.chip import Chip, Launch, chip_of

NAME = "sample"
BLOCK = 4096
CANDIDATES = 1024  # that torch picks out of each row


@triton.jit
def mixed(x: tl.tensor) -> tl.tensor:
    """splitmix64's finalizer, on uint64."""
    x = (x ^ (x >> 30)) * tl.full([], 0xBF58476D1CE4E5B9, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full([], 0x94D049BB133111EB, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def key_of(x: tl.tensor) -> tl.tensor:
    """Integers in the order of the float32 numbers."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key: tl.tensor) -> tl.tensor:
    key = key.to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def from_key(
    row: tl.tensor, highest: tl.tensor, cut: tl.tensor, low: tl.tensor, best: tl.tensor, cold: tl.tensor,
    least: tl.tensor, vocab: tl.tensor, COUNT: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return how many tokens have key >= low and weight >= least, and the sum of their weights (float64).

    All keys above `cut` are among the COUNT `highest`.
    """
    source = row
    end = vocab
    if low > cut:
        source = highest
        end = COUNT
    counts = tl.zeros([BLOCK], tl.int32)
    masses = tl.zeros([BLOCK], tl.float64)
    for start in range(0, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(source + place, mask=place < end, other=float("-inf")).to(tl.float32)
        weight = tl.exp((x - best) * cold)
        kept = (place < end) & (key_of(x) >= low) & (weight >= least)
        counts += kept.to(tl.int32)
        masses += tl.where(kept, weight, 0.0).to(tl.float64)
    return tl.sum(counts, 0), tl.sum(masses, 0)


@triton.jit
def sample_kernel(
    logits: tl.tensor,
    candidates: tl.tensor,
    temperatures: tl.tensor,
    top_ks: tl.tensor,
    top_ps: tl.tensor,
    min_ps: tl.tensor,
    seeds: tl.tensor,
    steps: tl.tensor,
    out: tl.tensor,
    logits_row: tl.tensor,
    vocab: tl.tensor,
    COUNT: tl.constexpr,
    COUNT_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    place = tl.program_id(0)
    row = logits + place.to(tl.int64) * logits_row
    highest = candidates + place.to(tl.int64) * COUNT
    temperature = tl.load(temperatures + place)
    k = tl.load(top_ks + place)
    top_p = tl.load(top_ps + place)
    least = tl.load(min_ps + place).to(tl.float32)
    seed = tl.load(seeds + place).to(tl.uint64)
    step = tl.load(steps + place).to(tl.uint64)
    number = mixed(mixed(seed) + (step + 1) * tl.full([], 0x9E3779B97F4A7C15, tl.uint64))
    uniform = (number >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53

    first = tl.arange(0, COUNT_PAD)
    best = tl.max(tl.load(highest + first, mask=first < COUNT, other=float("-inf")).to(tl.float32), 0)
    lowest = tl.min(tl.load(highest + first, mask=first < COUNT, other=float("inf")).to(tl.float32), 0)
    cut = key_of(lowest).to(tl.int64)
    bottom = key_of(tl.full([], float("-inf"), tl.float32)).to(tl.int64)
    top = key_of(best).to(tl.int64)
    chosen = top  # the key of the token, and which of its equals
    nth = tl.zeros([], tl.int32)
    count = tl.zeros([], tl.int32)
    reached = tl.zeros([], tl.float64)
    if temperature > 0:
        cold = (1.0 / tl.maximum(temperature, 1e-6)).to(tl.float32)
        edge = bottom  # all keys above `edge` are kept, and the first `equals` of those at it
        if k < vocab:
            high = top
            if k <= COUNT:
                edge = tl.maximum(edge, cut)
            while edge < high:
                middle = edge + (high - edge + 1) // 2
                count, reached = from_key(row, highest, cut, middle, best, cold, 0.0, vocab, COUNT, BLOCK)
                if count >= k:
                    edge = middle
                else:
                    high = middle - 1
        above, mass_above = from_key(row, highest, cut, edge + 1, best, cold, 0.0, vocab, COUNT, BLOCK)
        count, reached = from_key(row, highest, cut, edge, best, cold, 0.0, vocab, COUNT, BLOCK)
        equals = tl.minimum(count, k) - above
        mass = mass_above + equals.to(tl.float64) * tl.exp((value_of(edge) - best) * cold).to(tl.float64)
        if top_p < 1:
            goal = top_p * mass
            high = top
            low = edge
            if cut >= low:
                count, reached = from_key(row, highest, cut, cut + 1, best, cold, 0.0, vocab, COUNT, BLOCK)
                if reached >= goal:
                    low = cut + 1
            while low < high:
                middle = low + (high - low + 1) // 2
                count, reached = from_key(row, highest, cut, middle, best, cold, 0.0, vocab, COUNT, BLOCK)
                if reached >= goal:
                    low = middle
                else:
                    high = middle - 1
            above, mass_above = from_key(row, highest, cut, low + 1, best, cold, 0.0, vocab, COUNT, BLOCK)
            count, reached = from_key(row, highest, cut, low, best, cold, 0.0, vocab, COUNT, BLOCK)
            weight = tl.exp((value_of(low) - best) * cold).to(tl.float64)
            wanted = tl.ceil((goal - mass_above) / tl.maximum(weight, 1e-300))
            ties = tl.minimum(tl.maximum(wanted, 1.0), (count - above).to(tl.float64)).to(tl.int32)
            if low == edge:
                ties = tl.minimum(ties, equals)
            edge = low
            equals = ties
        weight = tl.exp((value_of(edge) - best) * cold)
        at_edge = tl.where(weight >= least, equals.to(tl.float64) * weight.to(tl.float64), 0.0)
        count, mass_above = from_key(row, highest, cut, edge + 1, best, cold, least, vocab, COUNT, BLOCK)
        goal = uniform * (mass_above + at_edge)
        chosen = edge
        before = mass_above
        if mass_above > goal:
            high = top
            chosen = edge + 1
            if cut >= chosen:
                count, reached = from_key(row, highest, cut, cut + 1, best, cold, least, vocab, COUNT, BLOCK)
                if reached > goal:
                    chosen = cut + 1
            while chosen < high:
                middle = chosen + (high - chosen + 1) // 2
                count, reached = from_key(row, highest, cut, middle, best, cold, least, vocab, COUNT, BLOCK)
                if reached > goal:
                    chosen = middle
                else:
                    high = middle - 1
            above, before = from_key(row, highest, cut, chosen + 1, best, cold, least, vocab, COUNT, BLOCK)
            count, reached = from_key(row, highest, cut, chosen, best, cold, least, vocab, COUNT, BLOCK)
            equals = count - above
        weight = tl.exp((value_of(chosen) - best) * cold).to(tl.float64)
        index = tl.floor((goal - before) / tl.maximum(weight, 1e-300))
        nth = tl.minimum(tl.maximum(index, 0.0), (equals - 1).to(tl.float64)).to(tl.int32)

    token = tl.zeros([], tl.int32)
    seen = tl.zeros([], tl.int32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(row + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        same = ((key_of(x) == chosen) & (ids < vocab)).to(tl.int32)
        rank = seen + tl.cumsum(same, 0) - 1
        token += tl.sum(tl.where((same > 0) & (rank == nth), ids, 0), 0)
        seen += tl.sum(same, 0)
    tl.store(out + place, token.to(tl.int64))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    steps: Tensor,
    out: Tensor,
    chip: Chip | None = None,
    candidates: int = CANDIDATES,
) -> None:
    """Fill `out` [rows] with token ids; shapes and dtypes are at the file's head. Logits must be finite or -inf.

    Temperature 0 is greedy; top_k = vocab, top_p = 1, min_p = 0 filter nothing. Raises KernelError.
    """
    rows, vocab = logits.shape
    check(NAME, "logits", logits, (rows, vocab), FLOATS, logits)
    for name, tensor in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        check(NAME, name, tensor, (rows,), (torch.float64,), logits, dense=True)
    check(NAME, "top_k", top_k, (rows,), (torch.int32,), logits, dense=True)
    for name, tensor in (("seeds", seeds), ("steps", steps), ("out", out)):
        check(NAME, name, tensor, (rows,), (torch.int64,), logits, dense=True)
    chip = chip or chip_of(logits)
    count = min(candidates, vocab)
    args = {
        "logits": logits,
        "candidates": logits.topk(count, sorted=False).values,
        "temperatures": temperature,
        "top_ks": top_k,
        "top_ps": top_p,
        "min_ps": min_p,
        "seeds": seeds,
        "steps": steps,
        "out": out,
        "logits_row": logits.stride(0),
        "vocab": vocab,
        "COUNT": count,
        "COUNT_PAD": pow2(count),
        "BLOCK": min(BLOCK, pow2(vocab)),
    }
    chip.run(Launch(sample_kernel, (rows,), args, 512 // chip.target.warp_size, all_registers=True))
