"""The folder that a quantized checkpoint grows in: a file for each decoder layer, so that a run can go on.

A state file says what the finished shards are of; it goes when the last one is written and the index takes its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError
from core.json_files import read_json
from core.weights import SAFETENSORS_INDEX

if TYPE_CHECKING:
    from torch import Tensor

STATE = "unfinished.json"


class Shards:
    """Files of tensors by number, the layers' first. Raises ConfigError for a folder that holds something else."""

    def __init__(self, folder: Path, count: int, identity: Mapping[str, Any]) -> None:
        self.folder, self.count = folder, count
        self.identity = json.loads(json.dumps(identity))  # as it comes back from the file
        self.origins: dict[str, dict[str, str]] = {}  # by shard, name in the module -> name in the file
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / STATE).is_file():
            self._resume()
        elif any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty. Give --output a new folder.")
        self._note()

    def _resume(self) -> None:
        found = read_json(self.folder / STATE)
        if found.get("identity") != self.identity:
            differs = [name for name, value in self.identity.items() if found.get("identity", {}).get(name) != value]
            raise ConfigError(
                f"{self.folder} holds an unfinished checkpoint made otherwise ({', '.join(differs)} differ). "
                "Give the same options to go on with it, or another --output."
            )
        self.origins = found["origins"]

    def path(self, number: int) -> Path:
        return self.folder / f"model-{number + 1:05}-of-{self.count:05}.safetensors"

    def done(self) -> set[int]:
        """Return the numbers of the shards that are complete."""
        return {number for number in range(self.count) if self.path(number).name in self.origins}

    def save(self, number: int, tensors: Mapping[str, Tensor], origins: Mapping[str, str]) -> None:
        """Write one shard; `origins` says under which name each of the module's tensors went into it as it is."""
        from safetensors.torch import save_file

        path = self.path(number)
        half = path.with_suffix(".half")
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, half, {"format": "pt"})
        half.replace(path)
        self.origins[path.name] = dict(origins)
        self._note()

    def load(self, number: int) -> dict[str, Tensor]:
        """Return a finished shard's tensors under the module's names."""
        from safetensors import safe_open

        path = self.path(number)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(stored) for name, stored in self.origins[path.name].items()}

    def finish(self, config: Mapping[str, Any], copied: Sequence[Path]) -> int:
        """Write index and config, copy the files beside them, and return the bytes of all shards."""
        import shutil

        weight_map = {name: path.name for path in map(self.path, range(self.count)) for name in _names(path)}
        total = sum(self.path(number).stat().st_size for number in range(self.count))
        _write(self.folder / SAFETENSORS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for file in copied:
            shutil.copy2(file, self.folder / file.name)
        _write(self.folder / "config.json", config)
        (self.folder / STATE).unlink()
        return total

    def _note(self) -> None:
        _write(self.folder / STATE, {"identity": self.identity, "origins": self.origins})


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return list(file.keys())


def _write(path: Path, value: Mapping[str, Any]) -> None:
    half = path.with_suffix(".half")
    half.write_text(json.dumps(value, indent=2) + "\n")
    half.replace(path)
