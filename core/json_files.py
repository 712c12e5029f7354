"""Reading a JSON object from a file, with errors that name it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core.errors import CheckpointError


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in `file`. Raises CheckpointError if it is not there, not JSON or not an object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a JSON {type(found).__name__}, where an object belongs.")
    return found
