"""Makes a quantized checkpoint out of a float one: a decoder layer at a time, each saved before the next is looked at.

Layers see the inputs that the quantized layers before them give: exactly the tensors that were written, read back by
the quantizer. Of a quantizer that `sees_floats` they see the float layers' instead: every layer is put back after it is
written. Either way a run that was cut off goes on as if it had not been.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.config import EngineConfig
from core.contracts import Checkpoint, Quantizer, QuantizeSettings
from core.engine_build import choose_device
from core.errors import ConfigError
from core.plugins import PluginHost
from core.quantize.calibration import calibration_text, cut_samples
from core.quantize.layer import DecoderLayer, unharmed
from core.quantize.march import Call, March
from core.quantize.matrices import find_matrices
from core.quantize.shards import Shards
from core.verify_layers import decoder_layers
from core.verify_plain import load_plain

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
DEFAULTS = QuantizeSettings()
Progress = Callable[[int, int], None]  # layers that are done, layers in all


@dataclass(frozen=True)
class QuantizeJob:
    """What to make of what."""

    model: str
    method: str
    output: Path
    settings: QuantizeSettings = DEFAULTS
    text: Path | None = None  # None: the shipped text
    samples: int | None = 64  # at most
    sample_length: int = 512  # tokens
    dtype: str = "auto"  # of what stays in floats; auto = the checkpoint's
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class QuantizeReport:
    """What was made."""

    output: Path
    group_size: int | None
    quantized: int  # linears
    in_floats: tuple[str, ...]  # matrices that are not quantized
    source_bytes: int  # of the weight files
    bytes: int


def quantize(job: QuantizeJob, host: PluginHost, progress: Progress = lambda done, total: None) -> QuantizeReport:
    """Write job.output. Raises ConfigError for settings that do not fit, CheckpointError for a bad model."""
    options = EngineConfig(model=job.model, device=job.device, trust_remote_code=job.trust_remote_code)
    quantizer = host.quantizer(job.method, job.settings)
    checkpoint = host.open_checkpoint(job.model, options)
    _check_source(checkpoint)
    device = torch.device(choose_device(job.device))
    model = load_plain(checkpoint, torch.float32, device, job.trust_remote_code).module
    work = _Work(job, model, quantizer)
    if quantizer.group_sizes:
        settings = replace(job.settings, group_size=work.choose_group_size())
        work.quantizer, work.group_size = host.quantizer(job.method, settings), settings.group_size
    samples = _samples(job, checkpoint, host, options) if quantizer.calibrates else []
    return work.run(samples, checkpoint, progress)


def _check_source(checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    if spec.quantization_config is not None:
        raise ConfigError(f"{spec.path} is quantized already. Give the float model.")
    if spec.format != "hf":
        raise ConfigError(f"{spec.path} is in the format {spec.format!r}; give a Hugging Face folder to quantize.")


def _samples(job: QuantizeJob, checkpoint: Checkpoint, host: PluginHost, options: EngineConfig) -> list[list[int]]:
    tokenizer = host.tokenizer(checkpoint.spec, options)
    length = min(job.sample_length, checkpoint.spec.max_positions or job.sample_length)
    return cut_samples(tokenizer.encode, calibration_text(job.text), length, job.samples)


class _Work:
    """One run over one model."""

    def __init__(self, job: QuantizeJob, model: Any, quantizer: Quantizer) -> None:
        self.job, self.model, self.quantizer = job, model, quantizer
        self.group_size: int | None = None
        self.config = model.config.get_text_config()
        found = decoder_layers(model, getattr(self.config, "num_hidden_layers", None)) or decoder_layers(model)
        if found is None:
            raise ConfigError(f"{job.model} has no list of decoder layers, so it cannot be quantized layer by layer.")
        self.names, self.layers = found.names, found.layers
        _one_expert_after_the_other(model)
        self.matrices = [find_matrices(model, *pair) for pair in zip(self.names, self.layers, strict=True)]
        self.linears = [matrices.linears for matrices in self.matrices]
        if not any(self.linears):
            raise ConfigError(
                f"The layers of {job.model} have no torch.nn.Linear, no Conv1D and no experts that a file keeps one by "
                "one, so there is nothing to quantize."
            )

    def choose_group_size(self) -> int:
        """Return what was asked for, else the largest that fits all; linears that no size fits stay in floats.

        Raises ConfigError if what was asked for does not divide the inputs of every other linear.
        """
        asked, sizes = self.job.settings.group_size, self.quantizer.group_sizes
        if asked == -1 and -1 in sizes:
            return -1
        grouped = [size for size in sizes if size > 0]
        unfit = [found.leave(lambda linear: linear.in_features % min(grouped) != 0) for found in self.matrices]
        widths = {linear.in_features: name for linears in self.linears for name, linear in linears.items()}
        if not widths:
            raise ConfigError(f"No linear has inputs in groups of {min(grouped)}; {sum(unfit)} have others.")
        fitting = [size for size in grouped if all(width % size == 0 for width in widths)]
        if asked in fitting or asked is None:
            return max(fitting) if asked is None else asked
        bad = next(width for width in widths if width % asked)
        raise ConfigError(
            f"Group size {asked} does not fit {self.job.method} here: {widths[bad]} has {bad} inputs. "
            f"What fits: {', '.join(map(str, fitting))}; see --group-size."
        )

    def run(self, samples: Sequence[Sequence[int]], checkpoint: Checkpoint, progress: Progress) -> QuantizeReport:
        self.dtype = _save_dtype(self.job, checkpoint)
        shards = Shards(self.job.output, len(self.layers) + 1, self._identity(samples, checkpoint))
        done = shards.done()
        self._restore(shards, done)
        progress(len(done), len(self.layers))
        for index, calls in self._march(samples, done):
            with self._put_back(index):
                shards.save(index, *self._quantize(index, calls))
            done.add(index)
            progress(len(done), len(self.layers))
        rest = len(self.layers)
        if rest not in done:
            prefixes = tuple(f"{name}." for name in self.names)
            left = {name: value for name, value in self._state().items() if not name.startswith(prefixes)}
            shards.save(rest, *_as_stored(self.model, left))
        return self._finish(shards, checkpoint)

    def _put_back(self, index: int) -> AbstractContextManager[None]:
        """Leave the layer in floats where later layers are to see what floats put out."""
        return unharmed(list(self.layers[index].modules())) if self.quantizer.sees_floats else nullcontext()

    def _march(self, samples: Sequence[Sequence[int]], done: set[int]) -> Iterator[tuple[int, list[Call]]]:
        """Layers in the order in which the model runs them; those that it does not run at the end."""
        if samples:
            yield from March(self.model, self.layers, samples, set(done) - {len(self.layers)})
        yield from ((index, []) for index in range(len(self.layers)) if index not in done)

    def _identity(self, samples: Sequence[Sequence[int]], checkpoint: Checkpoint) -> dict[str, Any]:
        settings = {**asdict(self.job.settings), "group_size": self.group_size}
        text = hashlib.sha256(repr([list(sample) for sample in samples]).encode()).hexdigest()
        source = str(checkpoint.spec.path)
        return {"model": source, "method": self.job.method, "calibration": text, "dtype": str(self.dtype), **settings}

    @torch.no_grad()
    def _quantize(self, index: int, calls: Sequence[Call]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Quantize one layer and return its shard: tensors by name in the file, and name in the module -> in the file.

        An expert's matrix, which no module has by itself, is called as `Matrices` calls it.
        """
        name, module, linears = self.names[index], self.layers[index], self.linears[index]
        made: Mapping[str, Mapping[str, Tensor]] = {}
        if linears and (calls or not self.quantizer.calibrates):
            layer = DecoderLayer(name, module, linears, calls, self.config, self._shared(index))
            made = self.quantizer.quantize_layer(layer)
        for linear, parts in made.items():
            linears[linear].weight.data.copy_(self.quantizer.restore(parts))
        in_file = self.matrices[index].in_file
        replaced = {f"{name}.{linear}.weight" for linear in made}
        kept = {key: value for key, value in self._state(f"{name}.").items() if key not in replaced}
        own = {
            f"{name}.{linear}.{suffix}": part
            for linear, parts in made.items()
            if linear not in in_file
            for suffix, part in parts.items()
        }
        stored, origins = _as_stored(self.model, kept | own)
        for linear, path in in_file.items():
            parts = made.get(linear) or {"weight": stored[f"{path}.weight"]}
            stored.pop(f"{path}.weight", None)
            stored |= {f"{path}.{suffix}": part for suffix, part in parts.items()}
            origins |= {f"{name}.{linear}.{suffix}": f"{path}.{suffix}" for suffix in parts}
        return stored, origins

    def _shared(self, index: int) -> frozenset[int]:
        own = {id(module) for module in self.layers[index].modules()}
        others = [module for module in self.model.modules() if id(module) not in own]
        return frozenset(id(parameter) for module in others for parameter in module.parameters(recurse=False))

    def _state(self, prefix: str = "") -> dict[str, Tensor]:
        """The module's tensors, tied ones once, in the dtype to save in; the module then has these values."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in self.model.state_dict().items():
            if tensor.data_ptr() in seen and tensor.numel():
                continue
            seen.add(tensor.data_ptr())
            if name.startswith(prefix):
                found[name] = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
                tensor.copy_(found[name])
        return found

    @torch.no_grad()
    def _restore(self, shards: Shards, done: set[int]) -> None:
        """Bring the module to where the finished shards left it."""
        if self.quantizer.sees_floats:
            return
        for index in sorted(done - {len(self.layers)}):
            state, stored = self.model.state_dict(), shards.load(index)
            for name in stored.keys() & state.keys():
                state[name].copy_(stored[name])
            for linear in self.linears[index]:
                path = f"{self.names[index]}.{linear}."
                parts = {name.removeprefix(path): tensor for name, tensor in stored.items() if name.startswith(path)}
                quantized = "weight" not in parts or len(parts.keys() - {"bias"}) > 1
                value = self.quantizer.restore(parts) if quantized else parts["weight"]
                if quantized or linear in self.matrices[index].in_file:
                    self.linears[index][linear].weight.data.copy_(value)

    def _finish(self, shards: Shards, checkpoint: Checkpoint) -> QuantizeReport:
        spec = checkpoint.spec
        quantized = self._quantized_names(shards)
        in_floats = [name for name in self._all_names() if name not in quantized]
        config = {name: value for name, value in spec.config.items() if name not in ("torch_dtype", "dtype")}
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        config["quantization_config"] = dict(self.quantizer.config(in_floats))
        beside = [file for file in spec.path.iterdir() if file.is_file() and _is_beside(file)]
        total = shards.finish(config, beside)
        source = sum(file.stat().st_size for file in spec.path.iterdir() if file.name.endswith(WEIGHT_FILES[:-1]))
        others = [
            f"{name}.{path}" for name, found in zip(self.names, self.matrices, strict=True) for path in found.others
        ]
        left = (*in_floats, *others)
        return QuantizeReport(self.job.output, self.group_size, len(quantized), left, source, total)

    def _all_names(self) -> list[str]:
        """Every matrix that could be quantized, by name in the module."""
        pairs = list(zip(self.names, self.matrices, strict=True))
        within = [f"{name}.{path}" for name, found in pairs for path in (*found.linears, *found.left)]
        linears = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        return list(dict.fromkeys([*within, *linears]))

    def _quantized_names(self, shards: Shards) -> set[str]:
        """A linear is quantized if the shards hold more of it than weight and bias."""
        stored = [name for origins in shards.origins.values() for name in origins]
        paths = {f"{layer}.{name}" for layer, found in zip(self.names, self.linears, strict=True) for name in found}
        plain = {f"{path}.{part}" for path in paths for part in ("weight", "bias")}
        owners = {_owner(name, paths) for name in stored if name not in plain}
        return {owner for owner in owners if owner is not None}


def _owner(name: str, paths: set[str]) -> str | None:
    """Return the linear that a tensor belongs to: "mlp.up_proj.weight.absmax" to "mlp.up_proj"."""
    parts = name.split(".")
    return next((path for n in (1, 2, 3) if (path := ".".join(parts[:-n])) in paths), None)


def _one_expert_after_the_other(model: Any) -> None:
    """Multiply with an expert at a time, where transformers knows other ways, so that each one's input is heard."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_experts_implementation", None):
            config._experts_implementation = "eager"


def _save_dtype(job: QuantizeJob, checkpoint: Checkpoint) -> torch.dtype:
    name = job.dtype if job.dtype != "auto" else str(checkpoint.spec.torch_dtype or "float32").removeprefix("torch.")
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"{name!r} is no dtype. Give --dtype float32, bfloat16 or float16.")
    return found


def _as_stored(model: Any, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors under the names that files of this model have, and module name -> file name of the unchanged.

    transformers renames and fuses tensors while it loads some models; its own function undoes that.
    """
    from transformers.core_model_loading import revert_weight_conversion

    stored: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    by_identity = {id(tensor): name for name, tensor in stored.items()}
    origins = {name: by_identity[id(tensor)] for name, tensor in tensors.items() if id(tensor) in by_identity}
    return stored, origins


def _is_beside(file: Path) -> bool:
    return file.name != "config.json" and not file.name.endswith(WEIGHT_FILES)
