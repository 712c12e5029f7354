"""Weights that kernels read move to huge pages, and whoever shares them sees them there."""

import pytest
import torch
from torch import nn

from core.layers import AffineTensor, Head, huge_pages
from core.layers.embedding import Embedding
from core.layers.huge_pages import AT_ONCE, CAN_ASK, HUGE_PAGE, LARGE, LEAST, HugePages
from core.layers.linear import pack_linears

COLUMNS = 256
ROWS = LEAST // COLUMNS  # enough of them to be moved


class Reads:
    """Kernels that read any weight as it lies."""

    takes_float32 = True

    def linear(self, weight, bias):
        return lambda x: nn.functional.linear(x, weight)


def affine(rows):
    parts = {"codes": torch.randint(0, 256, (rows, COLUMNS), dtype=torch.uint8), "scales": torch.rand(rows, 1)}
    return AffineTensor(parts, COLUMNS, torch.float32, bits=8, group_size=COLUMNS)


def test_placed_weights_keep_their_numbers_and_follow_each_other():
    pages, weights = HugePages(), [torch.randn(ROWS, COLUMNS) for _ in range(2)]
    wanted = [weight.clone() for weight in weights]
    for weight in weights:
        pages.place(weight)
    assert all(torch.equal(*pair) for pair in zip(weights, wanted, strict=True))
    if CAN_ASK:
        assert weights[0].data_ptr() % HUGE_PAGE == 0
        assert weights[1].data_ptr() == weights[0].data_ptr() + weights[0].nbytes


def test_memory_that_weights_took_is_let_go_while_others_are_still_to_move():
    let_go = []
    pages, half = HugePages(lambda: let_go.append(True)), AT_ONCE // 2
    for expected in ([], [True], [True]):
        pages.place(torch.zeros(half // 4))
        assert let_go == (expected if CAN_ASK else [])


def test_small_weights_stay_where_they_are():
    weight = torch.randn(8, 8)
    at = weight.data_ptr()
    HugePages().place(weight)
    assert weight.data_ptr() == at


@pytest.mark.parametrize("collapses", [True, False])
def test_a_large_weight_is_moved_only_where_the_system_cannot_collapse_it_in_place(collapses, monkeypatch):
    asked = []
    monkeypatch.setattr(huge_pages, "_collapsed", lambda tensor: (asked.append(tensor.nbytes), collapses)[1])
    weight = torch.randn(LARGE // 1024, 256)
    at, wanted = weight.data_ptr(), weight.clone()
    HugePages().place(weight)
    assert asked == ([weight.nbytes] if CAN_ASK else [])
    assert (weight.data_ptr() == at) == (collapses or not CAN_ASK)
    assert torch.equal(weight, wanted)


def test_the_parts_of_a_quantized_weight_are_moved_one_by_one():
    weight = affine(ROWS)
    at, wanted = weight.parts["codes"].data_ptr(), weight.decode()
    HugePages().place(weight)
    assert torch.equal(weight.decode(), wanted)
    assert (weight.parts["codes"].data_ptr() != at) == CAN_ASK


def test_an_embedding_follows_the_head_that_it_is_tied_to():
    model = nn.ModuleDict(
        {"embedding": Embedding(ROWS, COLUMNS, torch.float32), "head": Head(COLUMNS, 0, False, torch.float32)}
    )
    nn.init.normal_(model["embedding"].weight)
    model["head"].tie(model["embedding"])
    at, wanted = model["embedding"].weight.data_ptr(), model["embedding"].weight.clone()
    pack_linears(model, kinds=(Head,), kernels=Reads())
    assert model["embedding"].weight.data_ptr() == model["head"].weight.data_ptr()
    assert (model["embedding"].weight.data_ptr() != at) == CAN_ASK
    assert torch.equal(model["embedding"].weight, wanted)
