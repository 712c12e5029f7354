"""The versions of transformers that this fallback was tested with. Others are warned of, and probed like any.

At both ends of the range every causal language model that transformers knows was served and compared with `generate`
(`make conformance`, and the same with the oldest). Versions between them are taken to be right without a warning:
what a tier relies on either held at both ends or fails in the probe. Outside nothing is known but the probe.
"""

from __future__ import annotations

import logging
import re
from importlib.metadata import version

logger = logging.getLogger("core_serve.transformers")
OLDEST, NEWEST = (5, 10), (5, 23)  # (major, minor), both within the range


def warn_if_untested() -> None:
    """Say once, at load, that the installed transformers lies outside of the tested range."""
    found = version("transformers")
    if not OLDEST <= major_minor(found) <= NEWEST:
        logger.warning(
            "transformers %s is installed; the fallback was tested with %s to %s. It is probed as always, but a change "
            "of transformers that a few tokens do not show goes unnoticed: check with `core-serve verify MODEL`.",
            found,
            ".".join(map(str, OLDEST)),
            ".".join(map(str, NEWEST)),
        )


def major_minor(found: str) -> tuple[int, int]:
    """Return the first two numbers of a version: (5, 23) of "5.23.0.dev0"."""
    numbers = [int(number) for number in re.findall(r"\d+", found)[:2]]
    return numbers[0], numbers[1]
