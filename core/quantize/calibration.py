"""Text to calibrate and to measure with: the user's file, or the one that is shipped, cut into samples of equal length.

The shipped text is the first two chapters of Alice's Adventures in Wonderland (Lewis Carroll, 1865; public domain).
Its first half calibrates, its second half measures, so that no model is measured on what it was calibrated with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from core.errors import ConfigError

SHIPPED = Path(__file__).parent / "calibration.txt"


def calibration_text(file: Path | None) -> str:
    """Return the user's text, or the first half of the shipped one."""
    return file.read_text() if file is not None else _halves()[0]


def measuring_text(file: Path | None) -> str:
    """Return the user's text, or the second half of the shipped one."""
    return file.read_text() if file is not None else _halves()[1]


def _halves() -> tuple[str, str]:
    text = SHIPPED.read_text()
    middle = text.index("\n\n", len(text) // 2)
    return text[:middle], text[middle:].lstrip()


def cut_samples(encode: Callable[[str], list[int]], text: str, length: int, count: int | None) -> list[list[int]]:
    """Return up to `count` (None: all) samples of `length` tokens, one after the other from the text's start.

    A rest that is shorter is dropped, unless it is all there is. Raises ConfigError for a text without tokens.
    """
    ids = encode(text)
    if not ids:
        raise ConfigError("The text has no tokens; give a longer one.")
    whole = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return (whole or [ids])[:count]


def count_tokens(samples: Sequence[Sequence[int]]) -> int:
    return sum(map(len, samples))
