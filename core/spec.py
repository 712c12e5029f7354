"""ModelSpec: what a checkpoint says of its model, typed. Knows dictionaries only, neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import CheckpointError


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint's config under transformers' names, with the fields that the host itself needs."""

    path: Path
    format: str  # "hf" for a Hugging Face folder; another plugin's own name ("gguf")
    config: Mapping[str, Any]  # config.json as it stands
    generation_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        found = self.config.get("model_type")
        if not isinstance(found, str):
            raise CheckpointError(f"The config of {self.path} has no model_type, so no plugin can tell what it is.")
        return found

    @property
    def architectures(self) -> tuple[str, ...]:
        return tuple(self.config.get("architectures") or ())

    @property
    def architecture(self) -> str | None:
        """The class that saved the checkpoint, if it says so."""
        return self.architectures[0] if self.architectures else None

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The decoder's part of a composite config, else the config itself."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, Mapping) else self.config

    @property
    def auto_map(self) -> Mapping[str, Any]:
        """Classes in Python files of the checkpoint's own (remote code), by their Auto class."""
        return self.config.get("auto_map") or {}

    @property
    def quantization_config(self) -> Mapping[str, Any] | None:
        return self.config.get("quantization_config") or None

    @property
    def torch_dtype(self) -> str | None:
        """The dtype that the checkpoint was saved in, as torch names it."""
        return self.config.get("dtype") or self.config.get("torch_dtype")

    @property
    def max_positions(self) -> int | None:
        """The longest context that the config states, in tokens; None where it states none."""
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"):
            value = self.text_config.get(name)
            if isinstance(value, int) and value > 0:
                return value
        return None

    @property
    def max_context(self) -> int | None:
        """The longest text to serve, in tokens: max_positions, stretched where the rope grows with the text."""
        rope = self.text_config.get("rope_parameters") or self.text_config.get("rope_scaling") or {}
        longest = self.max_positions
        if longest is None or rope.get("rope_type", rope.get("type")) != "dynamic":
            return longest
        return int(longest * max(float(rope.get("factor") or 1.0), 1.0))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text: generation_config's, else config's."""
        found = self.generation_config.get("eos_token_id", self.text_config.get("eos_token_id"))
        if found is None:
            return ()
        return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)

    @property
    def name(self) -> str:
        return self.path.name
