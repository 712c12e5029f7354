"""Reach: how far back an attention layer looks, which says what of a text has to be kept for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reach:
    """How far back a layer looks: a window of so many tokens, itself included, or the chunk that a token lies in."""

    window: int | None = None
    chunk: int | None = None

    @property
    def is_bounded(self) -> bool:
        return self.window is not None or self.chunk is not None

    @property
    def most(self) -> int:
        """The most tokens that a token can see. Only for bounded ones."""
        return min(size for size in (self.window, self.chunk) if size is not None)

    def __str__(self) -> str:
        named = (("window", self.window), ("chunk", self.chunk))
        return " and ".join(f"{name} {size}" for name, size in named if size is not None) or "everything"

    def oldest(self, position: int) -> int:
        """Return the first position that the token at `position` sees."""
        found = 0 if self.window is None else max(0, position - self.window + 1)
        return found if self.chunk is None else max(found, position // self.chunk * self.chunk)


EVERYTHING = Reach()
