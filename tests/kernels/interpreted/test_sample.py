"""The sampling kernel draws what a sort of the whole row would draw, and what the sampler on the CPU draws."""

import pytest
import torch

from core.kernels.sample import sample
from core.sampling.draw import uniform


def plain_sample(row, temperature, top_k, top_p, min_p, seed, step):
    """One row: sort, filter, invert the cumulative distribution."""
    values, ids = row.double().sort(descending=True, stable=True)
    if temperature == 0:
        return ids[0].item()
    weights = ((values - values[0]) / temperature).exp()
    weights = weights[:top_k]
    before = weights.cumsum(0) - weights
    kept = (before < top_p * weights.sum()) & (weights >= min_p)
    weights = weights[kept]
    place = (weights.cumsum(0) <= uniform(seed, step) * weights.sum()).sum()
    return ids[min(int(place), len(weights) - 1)].item()


def draw(logits, rows, device, candidates=16):
    columns = list(zip(*rows, strict=True))
    temperature, top_k, top_p, min_p, seeds, steps = columns
    doubles = [torch.tensor(values, dtype=torch.float64, device=device) for values in (temperature, top_p, min_p)]
    ints = [torch.tensor(values, dtype=torch.int64, device=device) for values in (seeds, steps)]
    out = torch.full((len(rows),), -7, device=device)
    k = torch.tensor(top_k, dtype=torch.int32, device=device)
    sample(logits.to(device), doubles[0], k, doubles[1], doubles[2], *ints, out, candidates=candidates)
    return out.tolist()


VOCAB = 70
ROWS = [  # temperature, top_k, top_p, min_p, seed, step
    (0.0, VOCAB, 1.0, 0.0, 1, 0),
    (1.0, VOCAB, 1.0, 0.0, 12345, 3),
    (0.7, 5, 1.0, 0.0, 2**62 + 11, 1000),
    (1.3, VOCAB, 0.6, 0.0, 99, 7),
    (1.0, 1, 1.0, 0.0, 5, 5),
    (2.0, 20, 0.8, 0.1, 77, 1),
    (1.0, VOCAB, 1.0, 0.3, 31, 2),
]


@pytest.mark.parametrize("candidates", [16, pytest.param(VOCAB, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ties", [pytest.param(False, marks=pytest.mark.slow), True], ids=["distinct", "ties"])
def test_each_row_draws_what_a_sort_would_draw(ties, candidates, fresh_inputs, device):
    logits = torch.randn(len(ROWS), VOCAB) * 2
    if ties:
        logits = logits.round()
    rows = [(*row[:4], row[4] + fresh_inputs, row[5]) for row in ROWS]
    wanted = [plain_sample(logits[index], *row) for index, row in enumerate(rows)]
    assert draw(logits, rows, device, candidates) == wanted


@pytest.mark.slow
def test_a_filtered_row_draws_what_the_sampler_draws(device):
    from core.sampling.draw import draw as draw_on_cpu
    from core.sampling_params import SamplingParams

    logits = torch.randn(3, VOCAB) * 2
    params = [
        SamplingParams(temperature=0.8, top_k=7),
        SamplingParams(temperature=1.1, top_p=0.7),
        SamplingParams(temperature=1.5, top_k=30, top_p=0.9, min_p=0.05),
    ]
    numbers = [uniform(1234 + i, 0) for i in range(3)]
    wanted = draw_on_cpu(logits, logits.max(-1).values, [0, 1, 2], params, numbers, True).tolist()
    rows = [
        (p.temperature, p.top_k if p.top_k > 0 else VOCAB, p.top_p, p.min_p, 1234 + i, 0) for i, p in enumerate(params)
    ]
    assert draw(logits, rows, device) == wanted


def test_excluded_tokens_are_never_drawn(device):
    logits = torch.full((4, VOCAB), -torch.inf)
    logits[:, [3, 40]] = torch.tensor([0.0, 0.5])
    rows = [(5.0, VOCAB, 1.0, 0.0, seed, 0) for seed in range(4)]
    assert set(draw(logits, rows, device)) <= {3, 40}
