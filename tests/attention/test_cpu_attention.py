"""The CPU backend gives what the plain reference gives, and the reference what a dense formula over all keys gives."""

from __future__ import annotations

import random

import pytest
import torch

from core.attention.cpu import CpuAttention
from core.attention.torch_reference import TorchReferenceAttention
from core.batch import Batch, Places
from core.contracts import AttentionArgs, KVSpec
from core.errors import UnsupportedAttention

BLOCK = 4


class Case:
    """Random requests over a paged cache that was left full of NaN, with block tables in random order."""

    def __init__(self, lens: list[tuple[int, int]], heads: int, spec: KVSpec, seed: int) -> None:
        torch.manual_seed(seed)
        self.lens, self.heads, self.spec = lens, heads, spec  # lens: (context, new tokens) of each request
        blocks = [-(-context // BLOCK) for context, _ in lens]
        ids = list(range(1, sum(blocks) + 1))
        random.Random(seed).shuffle(ids)
        self.tables = [[ids.pop() for _ in range(count)] for count in blocks]
        self.num_blocks = sum(blocks) + 2
        self.k = [torch.randn(context, spec.num_kv_heads, spec.k_dim) for context, _ in lens]
        self.v = [torch.randn(context, spec.num_kv_heads, spec.v_dim) for context, _ in lens]
        self.q = [torch.randn(new, heads, spec.k_dim) for _, new in lens]

    def batch(self, backend: object) -> Batch:
        width = max(map(len, self.tables))
        starts = [0]
        for _, new in self.lens:
            starts.append(starts[-1] + new)
        return Batch(
            scheduled=(),
            token_ids=torch.zeros(starts[-1], dtype=torch.int64),
            positions=torch.cat([torch.arange(context - new, context) for context, new in self.lens]),
            everything=places(
                torch.cat([self.slots(row)[-new:] for row, (_, new) in enumerate(self.lens)]),
                torch.tensor([table + [0] * (width - len(table)) for table in self.tables]),
            ),
            query_starts=starts,
            context_lens=[context for context, _ in self.lens],
            logit_rows=torch.zeros(0, dtype=torch.int64),
            attention=backend,  # type: ignore[arg-type]  # not used by attention itself
        )

    def slots(self, row: int) -> torch.Tensor:
        positions = torch.arange(self.lens[row][0])
        return torch.tensor(self.tables[row])[positions // BLOCK] * BLOCK + positions % BLOCK

    def run(self, backend: CpuAttention | TorchReferenceAttention, args: AttentionArgs) -> torch.Tensor:
        backend.allocate([self.spec], [self.num_blocks], BLOCK)
        backend.cache.keys[0].fill_(torch.nan)
        backend.cache.values[0].fill_(torch.nan)
        for row, (context, new) in enumerate(self.lens):
            old = context - new
            written = places(self.slots(row)[:old], torch.empty(0))
            backend.cache.write(0, written, self.k[row][:old], self.v[row][:old])
        backend.plan(self.batch(backend))
        new_k = torch.cat([k[-new:] for k, (_, new) in zip(self.k, self.lens, strict=True)])
        new_v = torch.cat([v[-new:] for v, (_, new) in zip(self.v, self.lens, strict=True)])
        return backend.attend(torch.cat(self.q), new_k, new_v, 0, args)

    def dense(self, args: AttentionArgs) -> torch.Tensor:
        """One query token and one head at a time, over Python's own idea of what is visible."""
        group = self.heads // self.spec.num_kv_heads
        rows = []
        for (context, new), q, k, v in zip(self.lens, self.q, self.k, self.v, strict=True):
            for index in range(new):
                at = context - new + index
                keys = [j for j in range(context) if sees(at, j, args)]
                rows.append(
                    torch.stack(
                        [
                            self.one(q[index, h], k[keys, h // group], v[keys, h // group], keys, at, h, args)
                            for h in range(self.heads)
                        ]
                    )
                )
        return torch.stack(rows)

    @staticmethod
    def one(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: list[int], at: int, head: int, args: AttentionArgs
    ) -> torch.Tensor:
        scores = k.double() @ q.double() * args.scaling
        if args.softcap is not None:
            scores = torch.tanh(scores / args.softcap) * args.softcap
        if args.bias is not None and args.bias.dim() == 1:
            scores = scores - args.bias[head].double() * (at - torch.tensor(keys))
        if args.bias is not None and args.bias.dim() == 2:
            scores = scores + args.bias[head, [min(at - key, args.bias.shape[1] - 1) for key in keys]].double()
        weights = scores.exp()
        total = weights.sum() + (0 if args.sinks is None else args.sinks[head].double().exp())
        return ((weights / total) @ v.double()).float()


def places(slots: torch.Tensor, tables: torch.Tensor) -> Places:
    return Places(slots, tables, slots[slots % BLOCK == 0] // BLOCK)


def sees(query: int, key: int, args: AttentionArgs) -> bool:
    if key > query:
        return False
    if args.window is not None and query - key >= args.window:
        return False
    return args.chunk is None or key // args.chunk == query // args.chunk


HEADS = 6
ARGS = {
    "plain": {},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "chunk": {"chunk": 6},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": torch.linspace(-1, 2, HEADS)},
    "bias": {"bias": torch.linspace(0.1, 1, HEADS)},
    "bias table": {"bias": torch.linspace(-2, 2, HEADS * 9).reshape(HEADS, 9)},
    "all": {"window": 7, "softcap": 1.5, "sinks": torch.linspace(-1, 2, HEADS), "bias": torch.linspace(0.1, 1, HEADS)},
}
MIXES = {
    "decode": [(1, 1), (4, 1), (5, 1), (17, 1)],
    "prefill": [(7, 7), (4, 4), (1, 1)],
    "chunks beside decode": [(9, 1), (20, 7), (3, 3), (16, 1), (13, 8)],
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", ARGS)
@pytest.mark.parametrize("dims", [(3, 8, 8), (1, 8, 8), (6, 8, 4), (2, 6, 10)], ids=str)
@pytest.mark.parametrize("backend", [CpuAttention, TorchReferenceAttention])
def test_a_backend_gives_the_dense_formula(backend: type, dims: tuple[int, int, int], name: str, mix: str) -> None:
    spec = KVSpec("layer", *dims, torch.float32)
    case = Case(MIXES[mix], HEADS, spec, seed=len(name) + len(mix))
    args = AttentionArgs(scaling=0.4, **ARGS[name])
    torch.testing.assert_close(case.run(backend(), args), case.dense(args), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", [CpuAttention, TorchReferenceAttention])
def test_attention_to_the_future_is_refused_by_name(backend: type) -> None:
    case = Case([(3, 3)], 2, KVSpec("model.layers.7", 1, 8, 8, torch.float32), seed=0)
    with pytest.raises(UnsupportedAttention, match=r"not_causal, which layer model\.layers\.7 asks"):
        case.run(backend(), AttentionArgs(scaling=1.0, causal=False))


def test_heads_that_do_not_divide_are_refused() -> None:
    case = Case([(3, 3)], 3, KVSpec("layer", 2, 8, 8, torch.float32), seed=0)
    with pytest.raises(UnsupportedAttention, match="3 query heads"):
        case.run(CpuAttention(), AttentionArgs(scaling=1.0))
