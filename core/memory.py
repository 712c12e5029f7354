"""Memory that loading used and nobody needs any more goes back to the system."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Collect garbage and let the C library return its free pages; does nothing where it cannot (only glibc can)."""
    gc.collect()
    trim()


def trim() -> None:
    """Return what was freed already: between two steps of something that frees as much as it takes."""
    found = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if found is not None:
        found(0)
