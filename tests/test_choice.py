"""The rules that choose among bids: priority, --model-impl, ties, and what is said to whom nothing fits."""

import pytest

from core.choice import Wish, choose, explain_json, explain_text
from core.contracts import Bid, Refusal
from core.errors import NoImplementation, PluginError

NATIVE = ("native_llama", Bid("native_llama", 100, None, {"rope": "default"}))
PAGED = ("hf_fallback", Bid("transformers/paged", 30, None, is_fallback=True, family="transformers"))
ROWS = ("hf_fallback", Bid("transformers/rows", 20, None, is_fallback=True, family="transformers"))
DECLINED = ("native_qwen", Refusal("rope scaling yarn is not supported."))
ALL = [ROWS, PAGED, DECLINED, NATIVE]


def chosen(answers, name="auto", prefer=()):
    wish = Wish("model implementation", "--model-impl", name, prefer, has_native=True)
    return choose(answers, wish)


def names(choice):
    return [bid.name for bid in choice.eligible]


def test_auto_ranks_by_priority():
    choice = chosen(ALL)
    assert names(choice) == ["native_llama", "transformers/paged", "transformers/rows"]
    assert (choice.winner.plugin, choice.winner.bid.name) == ("native_llama", "native_llama")


def test_native_leaves_out_every_fallback():
    assert names(chosen(ALL, "native")) == ["native_llama"]


def test_native_never_falls_back_in_silence():
    with pytest.raises(NoImplementation) as caught:
        chosen([PAGED, DECLINED], "native")
    assert "native_qwen: rope scaling yarn is not supported" in str(caught.value)
    assert "transformers/paged" in str(caught.value)


def test_transformers_means_the_family_in_order():
    assert names(chosen(ALL, "transformers")) == ["transformers/paged", "transformers/rows"]


def test_a_bid_is_chosen_by_its_own_name_alone():
    assert names(chosen(ALL, "transformers/rows")) == ["transformers/rows"]


def test_a_plugins_name_means_all_its_bids():
    assert names(chosen(ALL, "hf_fallback")) == ["transformers/paged", "transformers/rows"]


def test_an_unknown_name_lists_what_there_is_and_who_declined():
    with pytest.raises(NoImplementation) as caught:
        chosen(ALL, "llama")
    for part in ("--model-impl llama", "native_llama", "transformers/rows", "native_qwen: rope scaling yarn"):
        assert part in str(caught.value)


def test_the_name_of_a_plugin_that_declined_gives_its_reason():
    with pytest.raises(NoImplementation, match="native_qwen: rope scaling"):
        chosen(ALL, "native_qwen")


def test_nobody_at_all_is_an_error():
    with pytest.raises(NoImplementation, match=r"No plugin offers a model implementation.*Install a plugin"):
        chosen([])


def test_a_tie_between_plugins_names_both_and_the_flag():
    rival = ("other", Bid("other_llama", 100, None))
    with pytest.raises(PluginError) as caught:
        chosen([NATIVE, rival])
    for part in ("'native_llama'", "'other_llama'", "--prefer"):
        assert part in str(caught.value)


@pytest.mark.parametrize("preferred", ["other", "other_llama"])
def test_prefer_settles_a_tie_by_plugin_or_bid(preferred):
    choice = chosen([NATIVE, ("other", Bid("other_llama", 100, None))], prefer=(preferred,))
    assert names(choice) == ["other_llama", "native_llama"]


def test_prefer_does_not_lift_a_lower_priority():
    assert names(chosen(ALL, prefer=("hf_fallback",)))[0] == "native_llama"


def test_a_tie_that_the_wish_leaves_out_is_none():
    assert names(chosen([NATIVE, PAGED, ("x", Bid("x", 100, None))], "transformers")) == ["transformers/paged"]


def test_a_tie_below_the_winner_is_none():
    assert names(chosen([NATIVE, PAGED, ("x", Bid("x", 30, None))]))[0] == "native_llama"


def test_two_bids_of_one_plugin_keep_its_order_when_equal():
    twins = [("p", Bid("first", 5, None)), ("p", Bid("second", 5, None))]
    assert names(chosen(twins)) == ["first", "second"]


def test_two_bids_of_one_name_are_an_error():
    with pytest.raises(PluginError, match=r"'a' and 'b' both bid as model implementation 'same'"):
        chosen([("a", Bid("same", 1, None)), ("b", Bid("same", 2, None))])


def test_native_is_no_name_where_there_are_no_fallbacks():
    with pytest.raises(NoImplementation, match="--attention-backend native"):
        choose([NATIVE], Wish("attention backend", "--attention-backend", "native"))


def test_explain_shows_every_bid_every_refusal_and_why_the_winner_serves():
    text = explain_text(chosen(ALL), width=200)
    for part in ("native_llama", "100", "rope: default", "serves: highest priority", "native_qwen", "declined: rope"):
        assert part in text
    assert "stands by as number 2" in text


def test_explain_says_what_a_wish_left_out():
    text = explain_text(chosen(ALL, "transformers"), width=200)
    assert "left out by --model-impl transformers" in text
    assert "serves: highest priority for --model-impl transformers" in text


def test_explain_shows_features_as_they_are_spelt():
    text = explain_text(chosen([("p", Bid("p", 1, None, {"types": frozenset({"[b]", "a"})}))]), width=200)
    assert "types: ['[b]', 'a']" in text


def test_explain_as_json_is_plain_data():
    import json

    report = json.loads(
        json.dumps(explain_json(chosen([("p", Bid("p", 1, None, {"honours": frozenset({"b", "a"})})), DECLINED])))
    )
    assert report["chosen"] == "p"
    assert report["bids"][0]["features"] == {"honours": ["a", "b"]}
    assert report["declined"] == [{"plugin": "native_qwen", "reason": "rope scaling yarn is not supported."}]
