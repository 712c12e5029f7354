"""Which texts to verify a model with: lengths around the edges where implementations go wrong, and their tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

from core.spec import ModelSpec

WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention", "window_size", "attention_window_size")
FIRST_ID = 3  # past the ids that most vocabularies give to padding, begin and end of text


def edge_lengths(spec: ModelSpec, block_size: int, longest: int) -> list[int]:
    """Return lengths in tokens, ascending, at most `longest`: one token, around a block, around window and chunk."""
    found = {1, 3 * block_size + 5, min(longest, 2 * block_size)}
    for edge in (block_size, *windows_of(spec)):
        found |= {edge - 1, edge, edge + 1}
    for window in windows_of(spec):
        found.add(window + 2 * block_size + 3)  # long enough for a chunk of a prompt to go past the window
    return sorted(length for length in found if 1 <= length <= longest)


def windows_of(spec: ModelSpec) -> list[int]:
    """Return the sizes of windows and chunks that the config states, in tokens."""
    config = spec.text_config
    names = [name for name in WINDOWS if name != "sliding_window" or config.get("use_sliding_window", True)]
    values = {config.get(name) for name in names}
    return sorted(value for value in values if isinstance(value, int) and value > 1)


def random_texts(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """Return one text of random ids for each length; the same arguments give the same texts."""
    draw = random.Random(0)
    low = min(FIRST_ID, vocab_size - 1)
    return [[draw.randrange(low, vocab_size) for _ in range(length)] for length in lengths]


def slices_of(ids: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Cut texts out of one long one, each from another place; if it is short, all of it is the longest."""
    fitting = sorted({length for length in lengths if length < len(ids)} | {min(len(ids), max(lengths))})
    places = [(len(ids) - length) * number // len(fitting) for number, length in enumerate(fitting)]
    return [list(ids[start : start + length]) for start, length in zip(places, fitting, strict=True)]
