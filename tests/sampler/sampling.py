"""What the sampler's tests share: requests, logits, repeated draws, and the plain definition they are held against."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from core.request import Request
from core.sampler import Sampler
from core.sampling_params import SamplingParams

VOCAB = 50
EOS = 7


def request(name="r", prompt=(1, 2, 3), output=(), seed=0, **params):
    made = Request(name, list(prompt), SamplingParams(**params), max_tokens=100, seed=seed)
    made.output_ids = list(output)
    return made


def logits(rows=1, vocab=VOCAB, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def sampler(vocab=VOCAB):
    return Sampler(vocab, [EOS])


def tokens(found):
    assert all(token.failed is None for token in found), found
    return [token.token_id for token in found]


def draws(row, count=4000, **params):
    """Sample one row's distribution many times, each with a seed of its own."""
    vocab = row.shape[-1]
    rows = [request(f"r{seed}", seed=seed, **params) for seed in range(count)]
    return Counter(tokens(sampler(vocab).sample(row.expand(count, vocab), rows)))


def reference(row, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities of one row, written as the definitions read."""
    scores = row.double().numpy() / temperature
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    probs = np.exp(scores - scores.max())
    kept = order[:top_k] if top_k > 0 else order
    share, nucleus, total = 0.0, [], probs[kept].sum()
    for token in kept:
        if share >= top_p:
            break
        nucleus.append(token)
        share += probs[token] / total
    final = [token for token in nucleus if probs[token] >= min_p * probs[order[0]]]
    out = np.zeros(len(scores))
    out[final] = probs[final] / probs[final].sum()
    return out


def near_edge(cumulative, number):
    """The draw works on float32 probabilities: a number this close to a boundary may fall on either side."""
    return np.abs(cumulative - number).min() < 1e-6
