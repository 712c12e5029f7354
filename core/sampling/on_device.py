"""The draw on a GPU: one copy there, one kernel, nothing read back.

Filters and the random number are those of `draw.py`. The kernel inverts the distribution in the order of scores, which
`draw.py` does only where it filters: an unfiltered request's tokens differ from a CPU's for the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.device import DeviceModule
from core.kernels.sample import sample
from core.request import Request
from core.staging import to_device


def draw_on_device(scores: Tensor, requests: Sequence[Request], ahead: Sequence[int], device: DeviceModule) -> Tensor:
    """Return a token [rows] int64 for each row of scores [rows, vocab]; greedy ones get the best.

    `ahead` [rows]: how many draft tokens stand between a request's output and the token to choose.
    """
    vocab, params = scores.shape[1], [request.params for request in requests]
    doubles = [
        [0.0 if p.greedy else p.temperature for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
    ]
    numbers = [len(request.output_ids) + more for request, more in zip(requests, ahead, strict=True)]
    longs = [[request.seed for request in requests], numbers]
    top_ks = [min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params]
    hosts = [torch.tensor(column, dtype=torch.float64) for column in doubles]
    hosts += [torch.tensor(column, dtype=torch.int64) for column in longs]
    temperature, top_p, min_p, seeds, steps, top_k = to_device(
        [*hosts, torch.tensor(top_ks, dtype=torch.int32)], device
    )
    tokens = torch.empty_like(seeds)
    sample(scores, temperature, top_k, top_p, min_p, seeds, steps, tokens)
    return tokens
