"""Logprobs of chosen tokens and of the best ones beside them, under the model's own distribution."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from core.outputs import Logprob, TokenLogprobs
from core.sampling.draw import parts_of


def token_logprobs(logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Return for each row its token's logprob and rank, then those of its `counts` best tokens, ties by lowest id.

    NaN logits give a NaN logprob for the token, and no best ones.
    """
    found: list[TokenLogprobs] = []
    for part in parts_of(list(range(len(token_ids))), logits.shape[1]):
        ids, asked = [token_ids[row] for row in part], [counts[row] for row in part]
        found += logprobs_of_part(logits[part].float(), ids, asked)
    return found


def logprobs_of_part(logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    norms = logits.logsumexp(-1, keepdim=True)
    tokens = torch.tensor(token_ids, device=logits.device)[:, None]
    chosen = logits.gather(1, tokens)
    values = (chosen - norms)[:, 0].tolist()
    ranks = ((logits > chosen).sum(-1) + equals_before(logits, tokens, chosen) + 1).tolist()
    tables: list[TokenLogprobs] = [
        {token: Logprob(value, rank)} for token, value, rank in zip(token_ids, values, ranks, strict=True)
    ]
    if any(counts):
        bests = best_tokens(logits, norms, max(counts))
        for table, best, count in zip(tables, bests, counts, strict=True):
            for rank, (token, value) in enumerate(best[:count], start=1):
                table.setdefault(token, Logprob(value, rank))
    return tables


def equals_before(logits: Tensor, tokens: Tensor, chosen: Tensor) -> Tensor:
    """Return how many tokens of a lower id have the chosen one's logit, for each row."""
    rows, ids = (logits == chosen).nonzero(as_tuple=True)
    counts = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return counts.index_add_(0, rows, (ids < tokens[rows, 0]).long())


def best_tokens(logits: Tensor, norms: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Return the best (token id, logprob) of each row, best first; one chosen token may be among them."""
    lowest = logits.topk(min(count, logits.shape[1])).values[:, -1:]
    rows, ids = (logits >= lowest).nonzero(as_tuple=True)  # more than count where the last ones are equal
    values = (logits[rows, ids] - norms[rows, 0]).cpu().numpy()
    scores, row_of, id_of = logits[rows, ids].cpu().numpy(), rows.cpu().numpy(), ids.cpu().numpy()
    order = np.lexsort((id_of, -scores, row_of))
    ends = np.searchsorted(row_of, np.arange(len(logits) + 1))
    return [
        [(int(id_of[at]), float(values[at])) for at in order[start : min(end, start + count)]]
        for start, end in pairwise(ends)
    ]
