"""Batch: the tensors of one step. All tokens of all its requests lie in one flat row, request after request.

request      A         B            C
tokens    [a5 a6 a7] [b9]  [c0 c1 c2 c3]        query_starts = [0, 3, 4, 8]
positions [ 5  6  7] [ 9]  [ 0  1  2  3]        context_lens = [8, 10, 4]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from core.contracts import AttentionBackend
    from core.reach import Reach
    from core.request import ScheduledTokens


@dataclass(frozen=True)
class Places:
    """Where K/V lies for layers of one reach."""

    slots: Tensor  # [tokens] int64, where each token's K/V goes: block * block_size + offset
    block_tables: Tensor  # [requests, most blocks] int64; 0 past a request's end and where a block was given back
    fresh: Tensor | None = None  # [blocks] int64, those whose first slot is written now: what others left is cleared


@dataclass(frozen=True)
class Batch:
    """Made by the runner; read by models and attention backends. Integers that Python needs are kept as lists too."""

    scheduled: Sequence[ScheduledTokens]  # what each request runs, in the order of the tensors
    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64, position in its own request, from 0
    everything: Places  # for layers that look back to the beginning
    query_starts: list[int]  # [requests + 1], half-open ranges into the tokens
    context_lens: list[int]  # [requests], tokens in the cache after this step, the new ones included
    logit_rows: Tensor  # [rows] int64, the tokens whose logits are wanted, ascending
    attention: AttentionBackend | None  # None: a model that keeps its own state
    windows: Mapping[Reach, Places] = field(default_factory=dict)  # for layers whose older blocks are given back
    only_highest: bool = False  # of each row of logits only the highest is wanted: others may be any that are lower

    def places(self, reach: Reach) -> Places:
        """Return where K/V lies for layers of this reach."""
        return self.windows.get(reach, self.everything)

    @property
    def num_requests(self) -> int:
        return len(self.context_lens)

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    @property
    def query_lens(self) -> list[int]:
        """New tokens by request."""
        return [end - start for start, end in zip(self.query_starts, self.query_starts[1:], strict=False)]
