"""The GGUF plugin: serves a .gguf file as if it were a Hugging Face folder. Holds hooks only; imports lazily."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.hookspecs import hookimpl

if TYPE_CHECKING:
    from core.config import EngineConfig
    from core.contracts import Checkpoint, QuantMethod, Tokenizer
    from core.spec import ModelSpec

CORE_API = (1, 0)  # the version of core's API that this plugin was written for


@hookimpl
def provide_checkpoint(path: str, options: EngineConfig) -> Checkpoint | None:
    """Answer for a .gguf file, and for a folder that holds one and no config.json."""
    from core_gguf.locate import find_gguf

    found = find_gguf(path)
    if found is None:
        return None
    from core_gguf.checkpoint import GGUFCheckpoint

    return GGUFCheckpoint.open(found)


@hookimpl
def provide_tokenizer(spec: ModelSpec, options: EngineConfig) -> Tokenizer | None:
    """Answer for a GGUF model, unless the user names another tokenizer."""
    if spec.format != "gguf" or options.tokenizer is not None:
        return None
    from core_gguf.tokenizer import open_tokenizer

    return open_tokenizer(spec, options)


@hookimpl
def provide_quant_method(spec: ModelSpec, options: EngineConfig) -> QuantMethod | None:
    """Answer for every GGUF file, unless the user names another plugin's method, which then gets the decoded floats."""
    from core_gguf.quant_method import choose_method

    return choose_method(spec, options)
