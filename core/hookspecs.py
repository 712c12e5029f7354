"""The contract between host and plugins, in the order in which the hooks are called.

A hook's name tells its kind: `register_*` all are called with the thing to fill; `provide_*` the first answer wins and
None declines; `resolve_*` all are asked and the highest bid wins; `on_*` observers that return nothing.
Plugins are asked in the order of their names, the builtin ones last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click
    from fastapi import FastAPI

    from core.config import EngineConfig
    from core.contracts import (
        AttentionBackend,
        Bid,
        Checkpoint,
        Model,
        Quantizer,
        QuantizeSettings,
        QuantMethod,
        Refusal,
        RequestRecord,
        StepStats,
        Tokenizer,
    )
    from core.kernel_contracts import Kernels
    from core.server.client import EngineClient
    from core.spec import ModelSpec

PROJECT = "core_serve"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_commands(cli: click.Group) -> None:
    """Add subcommands to `core-serve`.

    Called once when the command line starts, before torch is imported; implementations import nothing heavy.
    """


@hookspec(firstresult=True)
def provide_checkpoint(path: str, options: EngineConfig) -> Checkpoint | None:
    """Open the checkpoint at `path`, or return None if it is not in this plugin's format.

    Called once at start-up, and by `explain`; reads the config only. Builtin last: a Hugging Face folder.
    """


@hookspec(firstresult=True)
def provide_tokenizer(spec: ModelSpec, options: EngineConfig) -> Tokenizer | None:
    """Make the checkpoint's tokenizer, or return None.

    Called once in the engine's process, which hands it to the server's; there as well if it cannot be pickled. Builtin
    last: transformers' AutoTokenizer.
    """


@hookspec(firstresult=True)
def provide_quant_method(spec: ModelSpec, options: EngineConfig) -> QuantMethod | None:
    """Return the method that the checkpoint's quantization_config names or that --quantization asks for, else None.

    Called once at start-up, after the checkpoint is opened and before the model is built.
    """


@hookspec(firstresult=True)
def provide_quantizer(method: str, settings: QuantizeSettings) -> Quantizer | None:
    """Return what makes checkpoints by the method that `core-serve quantize --method` names, else None.

    Called by that command only, before the model is loaded. Raises ConfigError for settings that the method refuses.
    """


@hookspec(firstresult=True)
def provide_kernels(device: str, options: EngineConfig) -> Kernels | None:
    """Return fast kernels for a device ("cpu", "cuda:0"), or None if there are none for this machine.

    Called once at start-up, before the model is built. With no answer everything is computed with torch.
    """


@hookspec
def resolve_attention_backend(
    spec: ModelSpec, options: EngineConfig
) -> Bid[AttentionBackend] | Refusal | list[Bid[AttentionBackend] | Refusal] | None:
    """Bid to run attention on the device asked for: None, Refusal, Bid, or a list of these.

    Called once at start-up, and by `explain`. `bid.build()` takes no arguments and makes the backend. The winner is
    the highest bid, or the one named by --attention-backend.
    """


@hookspec
def resolve_model_impl(
    spec: ModelSpec, options: EngineConfig
) -> Bid[Model] | Refusal | list[Bid[Model] | Refusal] | None:
    """Bid to build this model: None = not mine, Refusal = mine but not this one, Bid = I can; or a list of these.

    Called once at start-up, and by `explain`; looks at the config only, imports no model and reads no weights.
    `bid.build(checkpoint, context)` loads the weights; `context` is a core.model_loader.BuildContext.
    """


@hookspec
def register_routes(app: FastAPI, engine: EngineClient) -> None:
    """Add HTTP routes. Called once when the server is made, after the builtin routes."""


@hookspec
def on_step(stats: StepStats) -> None:
    """Observe a finished engine step. Called in the engine's process, on its thread, once a step.

    With speculation, `num_drafted` and `num_accepted` say how many tokens were guessed and how many were right.
    """


@hookspec
def on_request_finished(record: RequestRecord) -> None:
    """Observe a finished sample. Called in the engine's process, on its thread, once for each sample."""
