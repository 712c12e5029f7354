"""The options of the command line: SGLang's names, vLLM's as aliases where they differ. Defaults are the configs' own.

An option's last name is the field of EngineConfig or ServerOptions that it sets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from core.config import DTYPES, EngineConfig
from core.plugins import PluginHost

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]
UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": 1024,
    "mi": 1024**2,
    "gi": 1024**3,
    "ti": 1024**4,
}


def byte_size(value: str | int) -> int:
    """Read a number of bytes: 2GiB, 512MiB, 1.5GB, 1000000."""
    if isinstance(value, int):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", value.strip().lower())
    if found is None:
        raise click.BadParameter(f"{value!r} is not a size; right are 2GiB, 512MiB, 1.5GB or a number of bytes.")
    return int(float(found[1]) * UNITS[found[2] or ""])


def default_of(name: str) -> Any:
    """Return EngineConfig's own default of an option."""
    return getattr(EngineConfig, name)


def _option(*names: str, help: str, **attributes: Any) -> Decorator[Any]:
    field = names[-1].lstrip("-").replace("-", "_")
    attributes.setdefault("default", default_of(field))
    attributes.setdefault("show_default", attributes["default"] is not None)
    return click.option(*names, help=help, **attributes)


def _flag(*names: str, help: str, **attributes: Any) -> Decorator[Any]:
    return _option(*names, help=help, is_flag=True, show_default=False, **attributes)


def _stacked(options: Sequence[Decorator[Any]]) -> Decorator[Any]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


DISABLE_PLUGIN = click.option(
    "--disable-plugin", "disable_plugins", multiple=True, metavar="NAME", help="Leave a plugin out; repeatable."
)

MODEL_PATH = _option(
    "--model-path",
    "--model",
    "model",
    metavar="PATH",
    help="Folder or file of the model, or the name of one in the local cache. Default: the demo model.",
)

MODEL_OPTIONS = [
    _option("--model-impl", metavar="NAME", help="auto, native, transformers, or the name of an implementation."),
    _option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="auto is float32 on a CPU; on a GPU the checkpoint's half type, else bfloat16.",
    ),
    _option("--device", metavar="NAME", help="auto is cuda where there is one, else cpu."),
    _option("--quantization", metavar="NAME", help="Quantization method. Default: the one that the checkpoint names."),
    _option("--attention-backend", metavar="NAME", help="Attention backend. Default: the highest bid."),
    _flag("--trust-remote-code", help="Allow running Python code that the checkpoint brings along."),
    _option("--tokenizer-path", "--tokenizer", "tokenizer", metavar="PATH", help="Default: the model's own."),
    _flag("--skip-tokenizer-init", help="Serve token ids only, without a tokenizer."),
    _option("--chat-template", metavar="FILE", help="A Jinja file. Default: the model's own."),
    _option("--prefer", multiple=True, metavar="NAME", help="Settle a tie for a plugin or implementation; repeatable."),
    DISABLE_PLUGIN,
    click.option(
        "--disable-patch",
        "disable_patches",
        multiple=True,
        metavar="NAME",
        help="Leave out a patch of the transformers fallback; repeatable.",
    ),
]

ENGINE_OPTIONS = [
    _option(
        "--context-length", "--max-model-len", "max_model_len", type=int, help="Tokens. Default: the model's limit."
    ),
    _option(
        "--max-running-requests",
        "--max-num-seqs",
        "max_num_seqs",
        type=int,
        help="Requests that run at a time. Default: 64 on a CPU, 256 on a GPU.",
    ),
    _option(
        "--chunked-prefill-size",
        "--max-num-batched-tokens",
        "max_num_batched_tokens",
        type=int,
        help="Token budget of a step. Default: 512 on a CPU, 4096 on a GPU.",
    ),
    _option(
        "--mixed-prefill-size",
        "max_mixed_prefill_tokens",
        type=int,
        help="Tokens of prompts in a step that decodes too. Default: 16 on a CPU, the whole budget on a GPU.",
    ),
    _option("--max-queued-requests", "max_num_waiting", type=int, help="Requests that may wait."),
    _flag(
        "--disable-radix-cache",
        "--no-enable-prefix-caching",
        "enable_prefix_caching",
        flag_value=False,
        help="Compute every prompt anew, sharing no K/V between requests.",
    ),
    _option("--page-size", "--block-size", "block_size", type=int, help="Tokens in a KV block."),
    _option("--num-blocks", type=int, help="KV blocks. Default: what --kv-cache-memory holds."),
    _option(
        "--kv-cache-memory",
        type=byte_size,
        metavar="SIZE",
        help="Memory for K/V. Default: 2GiB on a CPU, --mem-fraction-static on a GPU.",
    ),
    _option(
        "--mem-fraction-static",
        "--gpu-memory-utilization",
        "mem_fraction_static",
        type=float,
        metavar="SHARE",
        help="Share of a GPU's memory for weights and K/V. Default: 0.88.",
    ),
    _option("--kv-cache-dtype", type=click.Choice(DTYPES), help="Of K/V in the cache. auto is the model's own."),
    _flag(
        "--disable-cuda-graph",
        "--enforce-eager",
        "enable_cuda_graph",
        flag_value=False,
        help="Run decode steps kernel by kernel on a GPU.",
    ),
    _flag(
        "--disable-head-screen",
        "enable_head_screen",
        flag_value=False,
        help="Compute all logits where a request wants the highest one; saves a copy of the head.",
    ),
    _option(
        "--speculative-ngram",
        "--prompt-lookup-max",
        "speculative_ngram",
        type=int,
        help="Guess tokens from a request's own text: longest n-gram to look up. 0 is off.",
    ),
    _option(
        "--speculative-ngram-min", "--prompt-lookup-min", "speculative_ngram_min", type=int, help="Shortest n-gram."
    ),
    _option(
        "--speculative-num-draft-tokens",
        "--num-speculative-tokens",
        "speculative_num_draft_tokens",
        type=int,
        help="Tokens to guess for a request in a step, at the most.",
    ),
    _option("--random-seed", "--seed", "seed", type=int, help="For requests that give none."),
    _option("--num-threads", type=int, help="CPU threads of the engine. Default: torch's own choice."),
]


def model_options(function: F) -> F:
    """Add what chooses a model's implementation."""
    decorated: F = _stacked(MODEL_OPTIONS)(function)
    return decorated


def engine_options(function: F) -> F:
    """Add everything that EngineConfig takes."""
    decorated: F = _stacked([MODEL_PATH, *MODEL_OPTIONS, *ENGINE_OPTIONS])(function)
    return decorated


def make_config(given: Mapping[str, Any], host: PluginHost) -> EngineConfig:
    """Return the config of parsed options. Plugins are the host's: those were blocked before parsing."""
    return EngineConfig.from_options(**{**given, "disable_plugins": host.disabled})
