"""The versions of transformers that this fallback was tested with. Others are warned of, and probed like any."""

from __future__ import annotations

import logging
from importlib.metadata import version

logger = logging.getLogger("core_serve.transformers")
TESTED = ((5, 23),)  # (major, minor): every causal language model of these was served and compared


def warn_if_untested() -> None:
    """Say once, at load, that the installed transformers is not among the tested ones."""
    found = version("transformers")
    if tuple(int(part) for part in found.split(".")[:2] if part.isdigit()) not in TESTED:
        names = ", ".join(".".join(map(str, one)) for one in TESTED)
        logger.warning(
            "transformers %s is installed; the fallback was tested with %s. It is probed as always, but a change of "
            "transformers that a few tokens do not show goes unnoticed: check with `core-serve verify MODEL`.",
            found,
            names,
        )
