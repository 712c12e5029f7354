"""Incremental decoding: all deltas together are the full decode, whatever the tokenizer, up to a stop string."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from core.detokenizer import Detokenizer
from core.errors import InvalidParameter
from core.sampling_params import SamplingParams

TEXTS = ["Hello world, this is a test of the tokenizer.", "naïve café 你好，世界 🌍🌎 déjà vu", "The end. The END."] * 3
SPECIAL = ["<s>", "</s>"]


class Plain:
    """A tokenizer of the `tokenizers` library behind the part of the protocol that decoding needs; counts the work."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special_tokens=True):
        self.decoded += len(ids)
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def ids(self, *names):
        return [self.tokenizer.token_to_id(name) for name in names]


def byte_level():
    """As GPT-2, Llama 3, Qwen: every token is a string of bytes."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    return Plain(made)


def sentencepiece():
    """As Llama 2, Mistral: words carry their space in front, unknown characters are spelt in bytes."""
    words = ["▁", "▁Hello", "▁world", "▁a", "a", "b", "c", "é", ",", "lo"]
    vocab = {
        name: at for at, name in enumerate([*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])
    }
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.add_special_tokens(SPECIAL)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Plain(made)


BYTES, PIECES = byte_level(), sentencepiece()
HALVES = [b"\xe4", b"\xe4\xbd", b"\xf0\x9f\x8c", b"\xf0\x9f", b"\xff"]  # beginnings of characters


def run(tokenizer, ids, prompt=(), chunk=1, **params):
    """Return all deltas, and the stop string."""
    made = Detokenizer(tokenizer, list(prompt), SamplingParams(**params))
    deltas, stop = [], None
    for start in range(0, len(ids), chunk):
        found = made.append(ids[start : start + chunk], is_last=start + chunk >= len(ids))
        deltas.append(found.text)
        stop = found.stop
        if stop is not None:
            break
    return deltas, stop


def pieces_of(text):
    return PIECES.ids(*(f"<0x{byte:02X}>" for byte in text.encode()))


# -------------------------------------------------------------------------------------------- the whole text


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize("text", TEXTS[:3])
def test_the_deltas_of_a_text_are_the_text(text, chunk):
    assert "".join(run(BYTES, BYTES.encode(text), chunk=chunk)[0]) == text


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 339), max_size=60), chunk=st.integers(1, 5), skip=st.booleans())
def test_the_deltas_of_any_tokens_are_the_full_decode(ids, chunk, skip):
    deltas, _ = run(BYTES, ids, chunk=chunk, skip_special_tokens=skip)
    assert "".join(deltas) == BYTES.decode(ids, skip)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=80))
def test_the_deltas_of_any_bytes_are_the_full_decode(data):
    ids = byte_tokens(data)
    assert "".join(run(BYTES, ids)[0]) == BYTES.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(HALVES * 4 + [b"a"]), max_size=60))
def test_the_deltas_of_bytes_that_stay_undecided_for_long_are_the_full_decode(units):
    ids = byte_tokens(b"".join(units))
    assert "".join(run(BYTES, ids)[0]) == BYTES.decode(ids)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=60))
@example([0] + [1, 2] * 30)  # no token ends with a character
@example([5] + [0, 1, 2] * 30)
def test_the_deltas_of_tokens_that_end_one_character_and_begin_another_are_the_full_decode(ids):
    tokens = [b"\xe4", b"\xbd", b"\xa0\xe4", b"\x9f\x8c", b"\x8d\xf0", b"a"]
    made = Tokenizer(models.BPE(vocab={spelling(token): at for at, token in enumerate(tokens)}, merges=[]))
    made.decoder = decoders.ByteLevel()
    assert "".join(run(Plain(made), ids)[0]) == made.decode(ids)


def byte_tokens(data):
    """Return one token for each byte."""
    return BYTES.ids(*spelling(data))


def spelling(data):
    """Spell bytes as byte-level BPE does: those that do not print are letters from U+0100 on."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in prints]
    return "".join(chr(byte if byte in prints else 256 + others.index(byte)) for byte in data)


def test_every_byte_has_a_token():
    text = "你好 🌍 é\n"
    assert BYTES.decode(byte_tokens(text.encode())) == text
    assert len(set(byte_tokens(bytes(range(256))))) == 256


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("abc,é你好🌍 \n"), max_size=30), cut=st.integers(0, 10))
def test_the_deltas_continue_the_prompt_with_its_spaces(text, cut):
    ids = PIECES.encode("▁Hello" + text.replace(" ", "▁"))
    prompt, output = ids[: cut + 1], ids[cut + 1 :]
    whole, before = PIECES.decode(ids), PIECES.decode(prompt)
    if whole.startswith(before):
        assert before + "".join(run(PIECES, output, prompt)[0]) == whole


def test_a_leading_space_is_kept_after_a_prompt_and_dropped_without_one():
    output = PIECES.ids("▁world", "▁a")
    assert run(PIECES, output, PIECES.ids("▁Hello"))[0] == [" world", " a"]
    assert run(PIECES, output)[0] == ["world", " a"]


def test_a_space_is_kept_after_a_prompt_that_ends_in_many_special_tokens():
    prompt = PIECES.ids("▁Hello", *["</s>"] * 20)
    assert run(PIECES, PIECES.ids("▁world"), prompt)[0] == [" world"]


def test_special_tokens_show_only_if_asked_for():
    ids = [*BYTES.encode("ab"), *BYTES.ids("</s>"), *BYTES.encode("c")]
    assert "".join(run(BYTES, ids)[0]) == "abc"
    assert "".join(run(BYTES, ids, skip_special_tokens=False)[0]) == "ab</s>c"


def test_many_special_tokens_do_not_cost_the_space_of_the_next_word():
    ids = PIECES.ids("▁Hello", *["</s>"] * 50, "▁world")
    assert "".join(run(PIECES, ids)[0]) == "Hello world"


# ------------------------------------------------------------------------------------------- half characters


def test_half_a_character_waits_for_its_other_half():
    assert run(PIECES, [*PIECES.ids("a"), *pieces_of("🌍"), *PIECES.ids("b")])[0] == ["a", "", "", "", "🌍", "b"]


def test_half_a_character_at_the_end_is_given_out_as_it_is():
    ids = pieces_of("你")[:2]
    assert run(PIECES, ids)[0] == ["", PIECES.decode(ids)]


def test_a_character_begun_in_the_prompt_is_completed_by_the_output():
    start, end = BYTES.ids("ä", "½", "ł")[:1], BYTES.ids("½", "ł")  # E4 | BD A0 as byte-level letters
    prompt = [*BYTES.encode("ab"), *start]
    assert BYTES.decode([*prompt, *BYTES.ids("½", "ł")]) == "ab你"
    assert "".join(run(BYTES, [*end, *BYTES.encode("c")], prompt)[0]) == "你c"


def test_characters_that_were_given_out_stay_when_broken_bytes_follow():
    """The full decode of such bytes forgets the characters before them; a stream cannot take them back."""
    ids = [*pieces_of("你"), *pieces_of("好")[:1], *PIECES.ids("a")]
    assert "".join(run(PIECES, ids)[0]) == "你\ufffda"


def test_a_newline_spelt_as_a_byte_does_not_wait():
    assert run(PIECES, PIECES.ids("a", "<0x0A>", "<0x0A>", "b"))[0] == ["a", "\n", "\n", "b"]


@pytest.mark.parametrize("token", ["ł", "</s>"], ids=["broken bytes", "special tokens"])
def test_the_work_for_a_token_does_not_grow_with_the_output(token):
    def work(count):
        BYTES.decoded = 0
        run(BYTES, BYTES.ids(token) * count)
        return BYTES.decoded

    assert work(4000) < 2.5 * work(2000)


def test_the_work_for_a_token_does_not_grow_with_ordinary_text():
    ids = BYTES.encode(" ".join(TEXTS) * 5)
    BYTES.decoded = 0
    run(BYTES, ids)
    assert BYTES.decoded < 10 * len(ids)


# ---------------------------------------------------------------------------------------------- stop strings


def test_a_stop_string_that_spans_tokens_ends_the_text_before_it():
    deltas, stop = run(PIECES, PIECES.ids("a", "b", "c", "lo", "a"), stop=["bclo"])
    assert ("".join(deltas), stop) == ("a", "bclo")


def test_the_stop_string_is_kept_if_asked_for_and_what_follows_it_is_not():
    ids = PIECES.ids("a", "b", "lo")
    assert "".join(run(PIECES, ids, stop=["bl"], include_stop_str_in_output=True)[0]) == "abl"
    assert "".join(run(PIECES, ids, stop=["bl"])[0]) == "a"


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_does_not():
    assert run(PIECES, PIECES.ids("a", "b", "c", "a"), stop=["bcb"])[0] == ["a", "", "", "bca"]


def test_held_text_is_given_out_with_the_last_token():
    assert run(PIECES, PIECES.ids("a", "b", "c"), stop=["bcb"]) == (["a", "", "bc"], None)


def test_the_stop_string_that_is_complete_first_ends_the_text():
    assert run(PIECES, PIECES.ids("a", "b", "c", "c"), stop=["abcc", "bc"]) == (["", "", "a"], "bc")


def test_of_stop_strings_complete_at_once_the_one_that_began_first_wins():
    assert run(PIECES, PIECES.ids("a", "b", "c"), stop=["bc", "abc"]) == (["", "", ""], "abc")


def test_a_stop_string_is_found_in_a_character_of_many_tokens():
    assert run(PIECES, [*PIECES.ids("a"), *pieces_of("🌍"), *PIECES.ids("b")], stop=["🌍"])[1] == "🌍"


def test_nothing_comes_after_a_stop_string():
    made = Detokenizer(PIECES, [], SamplingParams(stop=["b"]))
    assert made.append(PIECES.ids("a", "b", "c"), is_last=False).text == "a"
    again = made.append(PIECES.ids("c"), is_last=True)
    assert (again.text, again.stop) == ("", "b")


def test_a_stop_string_before_min_tokens_is_plain_text():
    ids = PIECES.ids("a", "b", "a", "b", "c")
    assert run(PIECES, ids, stop=["ab"], min_tokens=3) == (["", "ab", "", ""], "ab")
    assert run(PIECES, ids, stop=["ab", "xyz"], min_tokens=3) == (["", "ab", "", ""], "ab")
    assert run(PIECES, ids, stop=["ab"], min_tokens=2) == (["", ""], "ab")


def test_a_stop_string_passed_over_is_not_found_later_in_held_text():
    ids = PIECES.ids("a", "b", "b", "a")
    assert run(PIECES, ids, stop=["ab", "abc"], min_tokens=3) == (["", "", "abb", "a"], None)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="abc", max_size=20),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    chunk=st.integers(1, 4),
    include=st.booleans(),
)
def test_stop_strings_cut_as_a_search_of_the_whole_text_does(text, stops, chunk, include):
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    deltas, stop = run(PIECES, PIECES.ids(*text), chunk=chunk, stop=stops, include_stop_str_in_output=include)
    if not found:
        assert ("".join(deltas), stop) == (text, None)
        return
    end, start, expected = min(found)
    assert ("".join(deltas), stop) == (text[: end if include else start], expected)


# ------------------------------------------------------------------------------------------------ no tokenizer


def test_without_a_tokenizer_all_text_is_empty():
    assert run(None, [1, 2, 3], prompt=[5]) == (["", "", ""], None)


def test_a_stop_string_without_a_tokenizer_is_refused():
    with pytest.raises(InvalidParameter, match="stop_token_ids") as caught:
        Detokenizer(None, [1], SamplingParams(stop=["x"]))
    assert caught.value.param == "stop"
