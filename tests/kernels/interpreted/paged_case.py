"""A step of random requests over a poisoned cache, run by the kernels and by the dense formula."""

from dataclasses import dataclass, field

import torch

from core.contracts import AttentionArgs
from core.kernels.attention_call import PagedCall, Tile, splits_for
from core.kernels.paged_decode import paged_decode
from core.kernels.paged_prefill import make_tiles, paged_prefill, tokens_of_a_tile
from core.kernels.write_kv import write_kv

from helpers import assert_near, dense_attention, poisoned, shuffled_tables  # isort: skip


@dataclass
class PagedCase:
    """`lens` = (context, new tokens) of each request; new tokens of 0 is a request that runs nothing this step."""

    lens: list
    kv_heads: int = 2
    group: int = 2
    k_dim: int = 16
    v_dim: int = 16
    block_size: int = 4
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    heads_first: bool = False  # layout of the cache: [blocks, kv_heads, block_size, dim] in memory
    tile: Tile = field(default_factory=lambda: Tile(16, 16, 4, 1))  # small, so that loops go round
    split: int = 16

    def __post_init__(self):
        self.heads = self.kv_heads * self.group
        contexts = [context for context, _ in self.lens]
        self.tables, self.num_blocks = shuffled_tables(contexts, self.block_size)

        def random(count, heads, dim):
            return torch.randn(count, heads, dim, device=self.device).to(self.dtype)

        self.q = [random(new, self.heads, self.k_dim) for _, new in self.lens]
        self.k = [random(context, self.kv_heads, self.k_dim) for context in contexts]
        self.v = [random(context, self.kv_heads, self.v_dim) for context in contexts]
        self.keys, self.values = self.cache(self.k_dim), self.cache(self.v_dim)

    def cache(self, dim):
        if not self.heads_first:
            shape = (self.num_blocks, self.block_size, self.kv_heads, dim)
            return poisoned(*shape, dtype=self.dtype, device=self.device)
        shape = (self.num_blocks, self.kv_heads, self.block_size, dim)
        return poisoned(*shape, dtype=self.dtype, device=self.device).transpose(1, 2)

    def slots(self):
        """Where every token of every request lies, request after request."""
        found = []
        for row, (context, _) in enumerate(self.lens):
            at = torch.arange(context)
            found.append(self.tables[row][at // self.block_size] * self.block_size + at % self.block_size)
        return torch.cat(found).to(self.device)

    def run(self, args, decode="by length", write=write_kv, attend=(paged_decode, paged_prefill)):
        """Write all K/V, then attend; return [tokens, heads, v_dim], poisoned where nothing was written."""
        write(torch.cat(self.k), torch.cat(self.v), self.keys, self.values, self.slots())
        q = torch.cat(self.q)
        out = poisoned(len(q), self.heads, self.v_dim, dtype=self.dtype, device=self.device)
        starts = torch.tensor([0, *(new for _, new in self.lens)]).cumsum(0)

        def ints(numbers):
            return torch.tensor(numbers, dtype=torch.int32, device=self.device)

        call = PagedCall(
            self.keys,
            self.values,
            self.tables.to(self.device),
            ints(starts.tolist()),
            ints([context for context, _ in self.lens]),
            self.tile,
        )
        single = [row for row, (_, new) in enumerate(self.lens) if new == 1 and decode == "by length"]
        several = [row for row, (_, new) in enumerate(self.lens) if new > 0 and row not in single]
        if single:
            longest = max(self.lens[row][0] for row in single)
            splits = splits_for(longest, self.split)
            attend[0](q, out, call, ints(single), splits, args, split=self.split)
        if several:
            tokens = tokens_of_a_tile(self.group, self.tile.rows)
            tiles = make_tiles([new for _, new in self.lens], several, tokens)
            attend[1](q, out, call, ints(tiles), args)
        return out

    def dense(self, args):
        parts = [
            dense_attention(q, k, v, args, self.group) for q, k, v in zip(self.q, self.k, self.v, strict=True) if len(q)
        ]
        return torch.cat(parts)

    def check(self, args, **run):
        assert_near(self.run(args, **run), self.dense(args), self.dtype)


def make_args(name, heads, device="cpu", scaling=0.3):
    """The arguments that a test's name stands for, joined by +."""
    known = {
        "plain": {},
        "window": {"window": 5},
        "window of one": {"window": 1},
        "wide window": {"window": 37},
        "chunk": {"chunk": 6},
        "softcap": {"softcap": 0.9},
        "sinks": {"sinks": torch.randn(heads, device=device)},
        "alibi": {"bias": torch.rand(heads, device=device)},
        "table": {"bias": torch.randn(heads, 12, device=device)},
    }
    asked = {}
    for one in name.split("+"):
        asked |= known[one]
    return AttentionArgs(scaling=scaling, **asked)
