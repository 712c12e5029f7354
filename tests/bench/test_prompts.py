"""Prompts have exactly the length that was asked for, and no two are alike."""

import pytest

from core.bench.prompts import Prompts
from core.errors import ConfigError


class Letters:
    """A tokenizer of single characters."""

    def encode(self, text, add_special_tokens=True):
        return [ord(letter) for letter in text]


@pytest.mark.parametrize("source", [Prompts(1000), Prompts(1000, list(range(400)))], ids=["random", "text"])
def test_prompts_have_the_length_asked_for_and_differ(source):
    drawn = source.draw(20, 31) + source.draw(20, 31)
    assert {len(prompt) for prompt in drawn} == {31}
    assert len({tuple(prompt) for prompt in drawn[:20]}) == 20
    assert all(0 <= token < 1000 for prompt in drawn for token in prompt)


def test_prompts_of_a_text_are_parts_of_it(tmp_path):
    text = "It was the best of times, it was the worst of times."
    (tmp_path / "text").write_text(text)
    for prompt in Prompts.of_file(tmp_path / "text", Letters(), 128).draw(5, 12):
        assert "".join(map(chr, prompt)) in text


def test_a_text_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "text").write_text("short")
    with pytest.raises(ConfigError, match="5 tokens, too few for 3 different prompts of 4"):
        Prompts.of_file(tmp_path / "text", Letters(), 128).draw(3, 4)


def test_a_text_needs_a_tokenizer(tmp_path):
    (tmp_path / "text").write_text("words")
    with pytest.raises(ConfigError, match="--text needs a tokenizer"):
        Prompts.of_file(tmp_path / "text", None, 128)
