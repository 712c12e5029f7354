"""A model's failure declines a tier; a mistake of our own is raised, and does not step down in silence."""

import pytest
from torch import nn

from core import LLM
from core.errors import CheckpointError
from core.testing import tiny_checkpoint
from core_hf_fallback import rows
from core_hf_fallback.blame import is_ours
from core_hf_fallback.interface import Binding


def code(name, source):
    """Return the function f of a module of that name."""
    space = {"__name__": name}
    exec(source, space)
    return space["f"]


@pytest.fixture
def gpt2(tmp_path):
    return tiny_checkpoint("gpt2", tmp_path)


def open_llm(folder, model_impl="transformers"):
    return LLM(model=str(folder), skip_tokenizer_init=True, model_impl=model_impl)


def test_a_mistake_on_the_paged_tier_is_raised(gpt2, monkeypatch):
    monkeypatch.setattr(Binding, "attend", lambda *_: undefined)  # noqa: F821
    with pytest.raises(NameError, match="undefined"):
        open_llm(gpt2)


def test_a_mistake_on_the_rows_tier_is_raised(gpt2, monkeypatch):
    monkeypatch.setattr(rows, "wanted_rows", lambda batch: batch.no_such_field)
    with pytest.raises(AttributeError, match="no_such_field"):
        open_llm(gpt2, "transformers/rows")


def test_a_module_that_fails_by_itself_is_an_error_in_its_own_words(gpt2, monkeypatch):
    import transformers.models.gpt2.modeling_gpt2 as modeling

    source = "def f(self, *_, **__): raise KeyError('in the model')"
    monkeypatch.setattr(modeling.GPT2Attention, "forward", code(modeling.__name__, source))
    # The plain module fails too, which is no tier's matter.
    with pytest.raises(CheckpointError, match=r"GPT2LMHeadModel itself fails .* KeyError: 'in the model'"):
        open_llm(gpt2)


@pytest.mark.parametrize(
    ("callers", "ours"),
    [
        (["core_hf_fallback.build", "transformers.models.x", "torch.nn"], False),
        (["core_hf_fallback.build", "transformers_modules.x"], False),
        (["core_hf_fallback.build", "transformers.models.x", "core_hf_fallback.interface", "torch.nn"], True),
        (["core_hf_fallback.build", "transformers.models.x", "core.attention.cpu", "numpy"], True),
        (["core_hf_fallback.build", "torch"], True),
    ],
)
def test_the_innermost_frame_that_is_no_librarys_tells(callers, ours):
    def fail():
        raise ValueError("somewhere")

    call = fail
    for name in reversed(callers):
        source = "def f(call): return lambda: call()"
        call = code(name, source)(call)
    model = nn.Sequential(type("Remote", (nn.Module,), {"__module__": "transformers_modules.x"})())
    with pytest.raises(ValueError, match="somewhere") as error:
        call()
    assert is_ours(error.value, model) is ours


def test_a_call_that_torch_refuses_while_counts_are_followed_is_the_models_mistake(tmp_path):
    # Its module pads a text to a whole chunk by an arange that runs backwards when the text is short.
    folder = tiny_checkpoint("reformer", tmp_path)
    with LLM(model=str(folder), model_impl="transformers", skip_tokenizer_init=True) as llm:
        assert llm.model_impl_name == "transformers/cache"
