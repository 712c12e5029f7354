"""What the kernel tests share: poison, tolerances, and the dense formula of attention."""

import random

import torch

HALF_ERROR = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit in the last place, relative


def poisoned(*shape, dtype=torch.float32, device="cpu"):
    """Memory that nobody has written: NaN."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def relative_error(found, wanted):
    """By norm, in float64; NaN if a NaN is left."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def tolerance(dtype):
    """float32: 1e-5. Half types: inputs, weights and output are each rounded once, so a few roundings."""
    return 1e-5 if dtype == torch.float32 else 3 * HALF_ERROR[dtype]


def assert_near(found, wanted, dtype=torch.float32, factor=1.0):
    error = relative_error(found, wanted)
    assert error <= factor * tolerance(dtype), f"relative error {error:.3g} in {dtype}"


def shuffled_tables(contexts, block_size, spare=3):
    """Block tables in random order; block 0 and `spare` others belong to nobody."""
    counts = [-(-context // block_size) for context in contexts]
    ids = list(range(1, sum(counts) + 1 + spare))
    random.Random(torch.initial_seed()).shuffle(ids)
    tables = [[ids.pop() for _ in range(count)] for count in counts]
    width = max(1, *map(len, tables)) if tables else 1
    return torch.tensor([table + [0] * (width - len(table)) for table in tables]), sum(counts) + 1 + spare


def dense_attention(q, k, v, args, group):
    """One request: q [new, heads, dim] at the end of k [context, kv_heads, dim]; in float64, one mask written out."""
    new, context = q.shape[0], k.shape[0]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * args.scaling
    if args.softcap is not None:
        scores = args.softcap * torch.tanh(scores / args.softcap)
    at = torch.arange(context - new, context, device=q.device)[:, None]
    key = torch.arange(context, device=q.device)[None, :]
    if args.bias is not None and args.bias.dim() == 1:
        scores = scores - args.bias.double()[:, None, None] * (at - key)
    if args.bias is not None and args.bias.dim() == 2:
        scores = scores + args.bias.double()[:, (at - key).clamp(0, args.bias.shape[1] - 1)]
    hidden = key > at
    if args.window is not None:
        hidden = hidden | (at - key >= args.window)
    if args.chunk is not None:
        hidden = hidden | (at // args.chunk != key // args.chunk)
    scores = scores.masked_fill(hidden, -torch.inf)
    if args.sinks is not None:
        sinks = args.sinks.double()[:, None, None].expand(-1, new, 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)
