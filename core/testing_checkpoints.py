"""Tiny random checkpoints of any of transformers' causal architectures. `core.testing` offers them.

torch and transformers are imported where they are used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError, CoreError
from core.testing_configs import model_class_of, tiny_config

if TYPE_CHECKING:
    from torch import Tensor

MAX_WEIGHTS = 20_000_000


def tiny_checkpoint(model_type: str, folder: str | Path, max_weights: int = MAX_WEIGHTS, **overrides: Any) -> Path:
    """Save a small random model of one of transformers' causal architectures, as a Hugging Face folder.

    `core.testing_configs` shrinks its default config; `overrides` are entries of config.json that win over that, for
    architectures whose sizes it does not know. No tokenizer; no token ends a text. Every weight is random,
    biases, norms and sinks too, so that none can be dropped unnoticed. The same arguments give the same weights.
    More than `max_weights` are refused, before they take memory.
    Raises ConfigError, with transformers' own words, for what it cannot build.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = Path(folder)
    model_class = model_class_of(model_type)
    with _explained(model_type):
        config = tiny_config(model_type, **overrides)
        size = _count_weights(model_class, config)
    _check_size(model_type, size, max_weights)
    with torch.random.fork_rng(devices=[]), _explained(model_type):
        torch.manual_seed(0)
        model = model_class._from_config(config, dtype=torch.float32)
        _randomize(model)
        model.generation_config.eos_token_id = None
        model.save_pretrained(str(folder))
    return folder


@contextmanager
def _explained(model_type: str) -> Iterator[None]:
    """Turn what building a model raises into a sentence that names it and says what to do."""
    try:
        yield
    except CoreError:
        raise
    except ImportError as error:
        first = " ".join(str(error).split()).split(". ")[0].removesuffix(".")
        raise ConfigError(
            f"transformers cannot build {model_type!r} without a package that is not installed: {first}. "
            "Install it, or take the model type of the text part."
        ) from error
    except Exception as error:  # a config class may refuse sizes with any exception of its own
        words = " ".join(str(error).split())
        raise ConfigError(
            f"transformers cannot build a small {model_type!r}: {type(error).__name__}: {words}. "
            "Give the sizes that it asks for as `overrides`, or the folder of a checkpoint."
        ) from error


def _count_weights(model_class: Any, config: Any) -> int:
    import torch

    with torch.device("meta"):
        return sum(weight.numel() for weight in model_class._from_config(config).parameters())


def packed_checkpoint(
    source: str | Path,
    folder: str | Path,
    quantization_config: Mapping[str, Any],
    pack: Callable[[str, Tensor], Mapping[str, Tensor] | None],
) -> Path:
    """Write a quantized copy of a Hugging Face folder, for tests of a quantization plugin.

    `pack(name, weight)` is asked for every tensor and gives what stands in its place by its last name
    ({"qweight": ..., "scales": ...} for "...q_proj.weight"), or None for a tensor that stays.
    """
    from safetensors.torch import save_file

    from core.weights import HFCheckpoint

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Tensor] = {}
    for name, tensor in HFCheckpoint(source).tensors():
        packed = pack(name, tensor)
        module = name.rpartition(".")[0]
        found |= {name: tensor} if packed is None else {f"{module}.{part}": value for part, value in packed.items()}
    save_file(found, str(folder / "model.safetensors"), metadata={"format": "pt"})
    for file in Path(source).glob("*.json"):
        config = json.loads(file.read_text())
        if file.name == "config.json":
            config["quantization_config"] = dict(quantization_config)
        (folder / file.name).write_text(json.dumps(config, indent=2))
    return folder


def _check_size(model_type: str, size: int, most: int) -> None:
    """Refuse a model that stayed large, before it takes memory: mostly one with towers for images or sound."""
    if size > most:
        raise ConfigError(
            f"{model_type!r} has {size:,} weights even when shrunk; tiny is {most:,} at most. Shrink the rest "
            "by `overrides`, or take the model type of its text part."
        )


def _randomize(model: Any) -> None:
    """Make outputs differ clearly between tokens: transformers' own initial weights give nearly flat logits."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * spread)
        for buffer in model.buffers():
            if buffer.is_floating_point() and not torch.isfinite(buffer).all():
                buffer.nan_to_num_(0.0)
