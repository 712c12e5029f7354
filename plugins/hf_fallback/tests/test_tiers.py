"""Each architecture is served by the fastest tier that is right for it, and answers like `generate`."""

from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from core import LLM, SamplingParams
from core.errors import NoImplementation
from core.testing import assert_matches_transformers, tiny_checkpoint
from core_hf_fallback import probe, versions
from core_hf_fallback.build import Loaded
from core_hf_fallback.interface import Binding

OLDEST = versions.major_minor(version("transformers")) == versions.OLDEST
TIERS = {
    "gpt2": "paged",  # learned positions
    # Softcap, and a window in every second layer. The sdpa attention of the oldest transformers drops the softcap, and
    # so does its generate; the paged tier does not.
    "gemma2": "rows" if OLDEST else "paged",
    "gpt_oss": "paged",  # sinks
    "mixtral": "paged",  # experts
    "olmo3": "paged",  # windows by layer
    "mamba": "rows",  # no attention
    "bloom": "rows",  # ALiBi, added to a mask of its own
}


@pytest.mark.parametrize("model_type", TIERS)
def test_a_model_is_served_by_its_tier_and_answers_like_transformers(model_type):
    served_by = assert_matches_transformers(model_type, "transformers", max_tokens=6)
    assert served_by.split()[0] == f"transformers/{TIERS[model_type]}"  # rows adds how it groups texts


def test_a_module_that_mixes_the_texts_of_a_batch_is_run_text_by_text_and_the_reason_says_so(caplog):
    # transformers' rwkv, in its own generate as well: this test tells when it is mended there
    assert assert_matches_transformers("rwkv", "transformers", max_tokens=6) == "transformers/cache"
    assert "texts of one length, without padding, are not kept apart in the module's own batch" in caplog.text


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return tiny_checkpoint("gpt2", tmp_path_factory.mktemp("gpt2"))


def open_llm(folder, **options):
    return LLM(model=str(folder), skip_tokenizer_init=True, block_size=4, **options)


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.mark.parametrize("tier", ["paged", "cache"])
def test_requests_do_not_influence_each_other(gpt2, tier):
    prompts = [list(range(3, 15)), list(range(60, 67)), [9, 9, 9]]
    with open_llm(gpt2, model_impl=f"transformers/{tier}") as llm:
        together = tokens(llm.generate(prompts, GREEDY))
        assert together == [tokens(llm.generate([prompt], GREEDY))[0] for prompt in prompts]
    assert len({tuple(answer) for answer in together}) > 1


@pytest.mark.parametrize("model_type", ["gemma2", "mamba"])
def test_few_blocks_and_preemption_give_the_same_tokens(model_type, tmp_path):
    folder = tiny_checkpoint(model_type, tmp_path)
    prompts = [list(range(3 + number, 15 + number)) for number in range(4)]
    params = GREEDY.with_changes(max_tokens=16)
    answers = []
    for num_blocks in (64, 10):  # 10 blocks of 4 tokens hold two prompts, but not two whole texts of 28
        with open_llm(folder, num_blocks=num_blocks) as llm:
            llm._engine.take_stats()
            answers.append(tokens(llm.generate(prompts, params)))
            preempted = sum(getattr(one, "num_preempted", 0) for one in llm._engine.take_stats())
            assert (preempted > 0) == (num_blocks == 10)
    assert answers[0] == answers[1]


def test_a_tier_asked_for_by_name_is_taken_or_nothing(tmp_path):
    folder = tiny_checkpoint("bloom", tmp_path)
    with pytest.raises(NoImplementation, match="transformers/paged: the flat batch fails in the module"):
        open_llm(folder, model_impl="transformers/paged")


def test_the_fallback_is_not_native(gpt2):
    with pytest.raises(NoImplementation, match="--model-impl native: no native model implementation"):
        open_llm(gpt2, model_impl="native")


def test_the_cache_tier_forgets_a_request_that_is_done(gpt2):
    with open_llm(gpt2, model_impl="transformers/cache") as llm:
        llm.generate([[5, 6, 7]], GREEDY)
        assert llm._engine.model.texts == {}


def test_the_cache_tier_says_that_nothing_of_it_can_be_shared(gpt2):
    with open_llm(gpt2, model_impl="transformers/cache") as llm:
        assert not llm.info.prefix_caching
        assert "serves: the only one for --model-impl" in llm.info.explanation


# ------------------------------------------------------------------------------------------------ the probe


def movement(size):
    return lambda: size


@pytest.mark.parametrize(
    ("worst", "moved", "allowed"),
    [
        (1e-4, 0.0, True),
        (1e-3, 1e-6, False),  # more than rounding makes of it
        (1e-3, 1e-4, True),  # the last bit of an embedding already moves logits by a tenth of that
        (6e-2, 1e-2, False),  # whatever the model does
        (float("inf"), float("inf"), False),
    ],
)
def test_a_difference_is_allowed_if_rounding_can_make_it(worst, moved, allowed):
    assert probe.allows(worst, torch.float32, movement(moved)) == allowed


def test_rounding_moves_the_paged_tier_as_it_moves_the_plain_module(gpt2, monkeypatch):
    moved = []

    def ask(worst, dtype, found):
        moved.append(found())
        return True

    plain = []
    make = Loaded.__init__

    def make_and_ask(self, *given):
        make(self, *given)
        plain.append(self.movement)

    monkeypatch.setattr(probe, "allows", ask)
    monkeypatch.setattr(Loaded, "__init__", make_and_ask)
    with open_llm(gpt2, model_impl="transformers/paged"):
        assert 0 < plain[0] / 10 < moved[0] < plain[0] * 10
    assert len(set(moved)) == 1  # it is measured once


@pytest.fixture
def rounded_otherwise(monkeypatch):
    """Return a function that moves what attention gives, up and down in turn, by a share of it."""
    plain = Binding.attend_as

    def move(share):
        def attend(binding, *args):
            out = plain(binding, *args)
            signs = 1 - 2 * (torch.arange(out.shape[-1]) % 2)
            return out if binding.recording else (out * (1 + signs * share)).to(out.dtype)

        monkeypatch.setattr(Binding, "attend_as", attend)

    return move


def test_in_half_types_a_token_may_go_to_another_expert_by_rounding(tmp_path, rounded_otherwise):
    """Its logits are then anywhere, in the module's own forward too: by 0.9 of their spread beside float32."""
    folder = tiny_checkpoint("mixtral", tmp_path)
    asked = {"model_impl": "transformers/paged", "dtype": "bfloat16", "disable_patches": ("layer-stack",)}
    rounded_otherwise(2**-7)
    with open_llm(folder, **asked) as llm:
        assert llm.model_impl_name == "transformers/paged"
    rounded_otherwise(0.5)
    with pytest.raises(NoImplementation, match="its logits differ from the plain module's"):
        open_llm(folder, **asked)


def test_a_place_is_wrong_if_it_is_far_off_in_every_text_that_is_drawn(monkeypatch):
    def difference(*found):
        answers = iter(found)
        monkeypatch.setattr(probe.Probe, "_far", lambda *_: dict.fromkeys(next(answers), 0.9))
        model = SimpleNamespace(impl_name="", vocab_size=9, features=None, kv_specs=list)
        drawn = [probe.Probe(probe.SHORT, {}, {}, None) for _ in range(3)]
        asked = replace(drawn[0], others=tuple(drawn[1:]))
        return asked.difference(model, SimpleNamespace(allocate=lambda *_, **__: None), torch.device("cpu"))

    first, decoded, others = (1, "A", 3), (2, "A", 11), (2, "B", 4)
    assert difference([]) is None
    assert difference([first, others], [decoded]) is None
    assert difference([first, others], [others], [decoded]) is None
    assert "step 2, tokens 11 to 11 of request A" in difference([decoded, first], [others, decoded], [decoded])
