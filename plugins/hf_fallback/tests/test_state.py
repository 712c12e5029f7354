"""States of several texts are put side by side and taken apart again, whatever their tensors look like."""

import pytest
import torch

from core.testing import assert_matches_transformers
from core_hf_fallback.state import CannotBatch, EqualLengths, Schema

WIDTH = 3


def padded(texts, length):
    """K/V that grows by token, recurrent state of one size, and counts as a number and as a tensor."""
    return {
        "kv": torch.full((texts, 2, length, WIDTH), float(length)),
        "state": torch.full((texts, WIDTH), float(length)),
        "count": length,
        "counts": torch.tensor([length]),
    }


def test_texts_of_different_length_stand_side_by_side_padded_on_the_left():
    schema = Schema(padded(1, Schema.SHORT), padded(1, Schema.LONG), padded(2, Schema.SHORT))
    both = schema.merge([padded(1, 4), padded(1, 6)], [4, 6])
    assert both["kv"].shape == (2, 2, 6, WIDTH)
    assert not both["kv"][0, :, :2].any()
    assert (both["count"], both["counts"].tolist()) == (6, [6])
    one = schema.select(both, torch.tensor([0]), 6, 4)
    assert torch.equal(one["kv"], padded(1, 4)["kv"])
    assert (one["count"], one["counts"].tolist()) == (4, [4])


def in_steps(texts, length):
    """Entries that each stand for four tokens, what is left over, and an overlap that is not there at first."""
    return {
        "entries": torch.full((texts, length // 4, WIDTH), float(length)),
        "left": torch.full((texts, length % 4, WIDTH), float(length)),
        "overlap": torch.full((texts, WIDTH), float(length)) if length >= 8 else None,
        "number": length // 4,
    }


def test_state_that_comes_in_steps_is_merged_for_texts_of_one_length():
    schema = EqualLengths(in_steps)
    both = schema.merge([in_steps(1, 10), in_steps(1, 10)], [10, 10])  # the overlap is new to it
    assert [both[name].shape[0] for name in ("entries", "left", "overlap")] == [2, 2, 2]
    one = schema.select(both, torch.tensor([1]), 10, 10)
    assert torch.equal(one["overlap"], in_steps(1, 10)["overlap"])
    assert one["number"] == 2


def test_what_is_not_the_same_and_has_no_batch_is_refused_by_its_place():
    schema = EqualLengths(lambda texts, length: {"number": length})
    with pytest.raises(CannotBatch, match=r"number differs between requests \(3, 4\)"):
        schema.merge([{"number": 3}, {"number": 4}], [9, 9])


@pytest.mark.parametrize(
    ("model_type", "tier"),
    [("xlstm", "transformers/rows"), ("deepseek_v4", "transformers/rows (texts of one length together)")],
)
def test_models_with_such_state_are_served_side_by_side(model_type, tier):
    prompts = [list(range(3, 3 + count)) for count in (1, 9, 9, 23)]
    assert assert_matches_transformers(model_type, "transformers", prompts=prompts, max_tokens=6) == tier
