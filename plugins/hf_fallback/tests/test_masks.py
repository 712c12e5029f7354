"""A mask function is read for what it lets through; one that says something else is not guessed at."""

import pytest
import torch
from transformers import masking_utils

from core_hf_fallback.masks import Mask, read_mask


def test_the_causal_mask():
    assert read_mask(masking_utils.causal_mask_function) == Mask()


@pytest.mark.parametrize("window", [1, 2, 8, 4096])
def test_a_sliding_window(window):
    assert read_mask(masking_utils.sliding_window_causal_mask_function(window)) == Mask(window=window)


@pytest.mark.parametrize("chunk", [2, 8, 8192])
def test_chunks(chunk):
    function = masking_utils.chunked_causal_mask_function(chunk, torch.zeros(1, dtype=torch.int64))
    assert read_mask(function) == Mask(chunk=chunk)


def bidirectional(batch, head, q, k):
    return q >= -k  # every query sees every key


def dilated(batch, head, q, k):
    return (k <= q) & ((q - k) % 2 == 0)


def prefix(batch, head, q, k):
    return (k <= q) | (k < 7)


@pytest.mark.parametrize("function", [bidirectional, dilated, prefix])
def test_an_odd_mask_is_not_guessed_at(function):
    mask = read_mask(function)
    assert mask.unknown == "its mask is neither causal, nor a sliding window, nor chunks"


def test_a_mask_function_that_fails_is_quoted():
    def padded(batch, head, q, k):
        return torch.ones(1, 4, dtype=torch.bool)[batch, k]

    assert "IndexError" in read_mask(padded).unknown
