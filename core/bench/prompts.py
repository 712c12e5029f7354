"""Prompts of an exact number of tokens, no two alike, so that no prefix cache helps. Imports no torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from core.contracts import Tokenizer
from core.errors import ConfigError


class Prompts:
    """Draws prompts: random ids, or parts of a text that begin at random tokens."""

    def __init__(self, vocab_size: int, text_ids: Sequence[int] | None = None, seed: int = 0) -> None:
        self.vocab_size, self.text_ids = vocab_size, text_ids
        self._random = random.Random(seed)

    @classmethod
    def of_file(cls, file: Path, tokenizer: Tokenizer | None, vocab_size: int) -> Prompts:
        """Raises ConfigError without a tokenizer."""
        if tokenizer is None:
            raise ConfigError("--text needs a tokenizer, and this engine runs without one.")
        return cls(vocab_size, tokenizer.encode(file.read_text(), add_special_tokens=False))

    def draw(self, count: int, length: int) -> list[list[int]]:
        """Return `count` prompts of `length` ids each. Raises ConfigError if the text is too short for that many."""
        if self.text_ids is None:
            return [self._random.choices(range(self.vocab_size), k=length) for _ in range(count)]
        starts = len(self.text_ids) - length + 1
        if starts < count:
            raise ConfigError(
                f"The text has {len(self.text_ids)} tokens, too few for {count} different prompts of {length}; "
                "give a longer one, or leave out --text for random tokens."
            )
        return [list(self.text_ids[start : start + length]) for start in self._random.sample(range(starts), count)]
