"""Which .gguf file, if any, does a path mean? Looks at names only."""

from __future__ import annotations

from pathlib import Path

from core.errors import CheckpointError


def find_gguf(path: str) -> Path | None:
    """Return the GGUF file that `path` names or holds; None if the path is in another format."""
    place = Path(path).expanduser()
    if place.is_dir():
        return _only_gguf_in(place)
    if place.suffix.lower() != ".gguf":
        return None
    if not place.is_file():
        raise CheckpointError(f"{place} does not exist. Give the path of a .gguf file.")
    return place


def _only_gguf_in(folder: Path) -> Path | None:
    if (folder / "config.json").exists():
        return None
    found = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() == ".gguf" and entry.is_file())
    if len(found) > 1:
        names = ", ".join(entry.name for entry in found)
        raise CheckpointError(f"{folder} holds {len(found)} GGUF files: {names}. Give the path of one of them.")
    return found[0] if found else None
