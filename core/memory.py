"""Memory that was freed, handed back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back_freed() -> None:
    """Let the C library return freed memory, of which loading leaves hundreds of MB. Linux with glibc only."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
