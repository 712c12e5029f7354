"""core-serve: an LLM serving engine whose parts are plugins. This file imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.errors import CoreError
from core.hookspecs import hookimpl
from core.sampling_params import SamplingParams
from core.threads import spin_briefly

if TYPE_CHECKING:
    from core.llm import LLM

API_VERSION = (1, 0)  # (major, minor): plugins state the range they were written for
__version__ = "0.1.0"
__all__ = ["API_VERSION", "LLM", "CoreError", "SamplingParams", "hookimpl"]

spin_briefly()


def __getattr__(name: str) -> Any:
    """Load LLM, and with it torch, when it is first asked for."""
    if name == "LLM":
        from core.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
