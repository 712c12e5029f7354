"""What a module asks of attention is honoured or refused by layer and argument; nothing is dropped."""

import re

import pytest
import torch
from torch import nn

from core.errors import UnsupportedAttention
from core_hf_fallback.interface import attention, bind, mask_interface
from core_hf_fallback.masks import Mask


class Calls(nn.Module):
    """A model of one layer that passes whatever it is given on to the interface."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Identity()
        self.binding = bind(self)
        self.binding.start(None)

    def attend(self, tokens=5, batch=1, mask=None, **arguments):
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(batch, 4, tokens, 8, generator=generator)
        k, v = torch.randn(2, batch, 2, tokens, 8, generator=generator)
        return attention(self.layer, q, k, v, mask, **arguments)[0]


@pytest.fixture
def model():
    return Calls()


def test_the_shapes_of_k_and_v_come_from_the_call(model):
    assert model.attend().shape == (1, 5, 4, 8)
    (spec,) = model.binding.specs
    assert (spec.name, spec.num_kv_heads, spec.k_dim, spec.v_dim) == ("layer", 2, 8, 8)


def test_attention_is_grouped_causal_attention(model):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 5, 8, generator=generator)
    k, v = torch.randn(2, 1, 2, 5, 8, generator=generator)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(model.attend(scaling=0.3), wanted.transpose(1, 2))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"alibi": torch.ones(4)}, "Layer layer of Calls passes 'alibi'"),
        ({"position_bias": torch.zeros(1, 4, 5, 5)}, "Layer layer of Calls passes 'position_bias'"),
        ({"head_mask": torch.ones(4)}, "Layer layer of Calls passes 'head_mask'"),
        ({"dropout": 0.1}, "Layer layer of Calls asks for dropout 0.1"),
        ({"mask": torch.zeros(1, 1, 5, 5)}, "Layer layer of Calls brings a mask of its own"),
        ({"mask": Mask(unknown="its mask is odd")}, "Layer layer of Calls: its mask is odd"),
        ({"batch": 2}, "Layer layer of Calls attends with a batch of 2"),
    ],
)
def test_what_it_would_drop_is_refused_by_name(model, arguments, named):
    model.attend(**arguments)
    assert [problem for problem in model.binding.problems if problem.startswith(named)]
    model.binding.recording = False  # while serving, it is an error at once
    with pytest.raises(UnsupportedAttention, match=named):
        model.attend(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"alibi": None}, {"output_attentions": False}, {"position_ids": torch.arange(5)}]
)
def test_bookkeeping_is_not_refused(model, arguments):
    assert torch.equal(model.attend(**arguments), Calls().attend())


@pytest.mark.parametrize(
    "arguments",
    [
        {"mask": Mask(window=2)},
        {"mask": Mask(chunk=2)},
        {"sliding_window": 2},
        {"softcap": 0.5},
        {"s_aux": torch.ones(4)},
    ],
)
def test_what_is_asked_for_changes_the_answer(model, arguments):
    assert not torch.allclose(model.attend(**arguments), Calls().attend())


def test_a_layer_that_attends_more_often_than_at_load_is_refused(model):
    model.attend()
    model.binding.recording = False
    model.binding._calls.clear()
    model.binding.batch = None
    with pytest.raises(UnsupportedAttention, match=r"Layer layer of Calls attends for the 1\. time"):
        model.attend()


def test_keys_of_the_modules_own_are_refused(model):
    q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 7, 8)
    attention(model.layer, q, k, k, None)
    assert "2 queries over 7 keys: it keeps state of its own" in model.binding.problems[0]


@pytest.mark.parametrize(
    ("shapes", "arguments", "named"),
    [
        (((4, 8), (2, 8), (1, 8)), {}, "Layer layer of Calls has 2 heads of K and 1 of V"),
        (((3, 8), (2, 8), (2, 8)), {}, "Layer layer of Calls attends with 3 query heads of width 8 over 2 K heads"),
        (((4, 8), (2, 6), (2, 8)), {}, "Layer layer of Calls attends with 4 query heads of width 8 over 2 K heads"),
        (((4, 8), (2, 8), (2, 8)), {"s_aux": torch.ones(2)}, r"Layer layer of Calls passes 's_aux' of shape \[2\]"),
    ],
)
def test_heads_that_fit_no_attention_are_refused_by_name(model, shapes, arguments, named):
    q, k, v = (torch.zeros(1, heads, 5, width) for heads, width in shapes)
    attention(model.layer, q, k, v, None, **arguments)
    assert re.match(named, model.binding.problems[0])


def test_a_mask_made_with_a_foreign_config_is_refused():
    with pytest.raises(UnsupportedAttention, match="config that none of its modules holds"):
        mask_interface(lambda batch, head, q, k: k <= q, config=object())
