"""Memory that loading used and nobody needs any more goes back to the system."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable


def give_back() -> None:
    """Collect garbage and let the C library return its free pages; does nothing where it cannot (only glibc can)."""
    gc.collect()
    trim()


def trim() -> None:
    """Return what was freed already: between two steps of something that frees as much as it takes."""
    found = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if found is not None:
        found(0)


def letting_go(checkpoint: object) -> Callable[[], None]:
    """Return what gives back memory in the middle of loading: pages of a file that is mapped, and what was freed."""
    forget_pages = getattr(checkpoint, "forget_pages", None)

    def let_go() -> None:
        if forget_pages is not None:
            forget_pages()
        trim()

    return let_go
