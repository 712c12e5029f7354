"""Whose mistake is an exception that comes out of a model's forward: the model's, which declines a tier, or ours?"""

from __future__ import annotations

import traceback

from torch import nn

OURS = ("core", "core_hf_fallback")
PASSES_ON = "core_hf_fallback.taint"  # stands between the model and torch, and only hands the model's call on


def is_ours(error: BaseException, module: nn.Module) -> bool:
    """True unless the innermost frame that is neither torch's nor a library's belongs to the model's own code.

    The model's code is transformers and every package that one of its modules comes from (remote code).
    """
    theirs = {"transformers", *(_package(type(part).__module__) for part in module.modules())} - {"torch", *OURS}
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        name = frame.f_globals.get("__name__", "")
        package = _package(name)
        if name == PASSES_ON:
            continue
        if package in OURS or package in theirs:
            return package in OURS
    return True


def _package(name: str) -> str:
    return name.partition(".")[0]
