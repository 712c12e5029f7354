"""The results file of a survey: JSON lines, appended as they come, so that one that was cut off goes on where it was.

A result counts for the code and the libraries that it was found with, and for no other.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import entry_points, version
from pathlib import Path

from core.errors import ConfigError
from core.hookspecs import PROJECT
from core.supported_check import Checked, Served

LIBRARIES = ("torch", "transformers")


def fingerprint() -> str:
    """Return 12 digits that change with the core's code, with that of an installed plugin, and with the libraries."""
    digest = hashlib.sha256()
    for name in LIBRARIES:
        digest.update(f"{name} {version(name)}\n".encode())
    for package in ("core", *sorted({entry.module.split(".")[0] for entry in entry_points(group=PROJECT)})):
        for file in _sources(package):
            digest.update(f"{package} {file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def _sources(package: str) -> list[Path]:
    """The files of an importable package, kernels in other languages among them; nothing is imported."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or ()) if spec else ()
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*")) if _is_source(file)]
    return files or ([Path(spec.origin)] if spec and spec.origin else [])


def _is_source(file: Path) -> bool:
    return file.is_file() and "__pycache__" not in file.parts


def read_results(results: Path | None) -> Iterator[Checked]:
    """Yield what a results file holds; where a model type has several lines, the last one counts."""
    if results is None or not results.exists():
        return
    for number, line in enumerate(results.read_text().splitlines(), 1):
        try:
            values = json.loads(line)
            served = {name: values[name] and Served(**values[name]) for name in ("auto", "fallback")}
            yield Checked(**{**values, **served})
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"Line {number} of {results} is no result of `core-serve supported-models` ({error}). "
                "Delete the line, and its model type is checked again."
            ) from error


def append_result(results: Path | None, found: Checked) -> None:
    """Add one line; without a file nothing is kept."""
    if results is not None:
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a") as file:
            file.write(json.dumps(asdict(found)) + "\n")
