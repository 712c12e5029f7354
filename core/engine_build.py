"""From a config to an engine: open the checkpoint, ask the plugins, build the model, size the K/V memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from core.blocks import BlockPool
from core.choice import Choice, explain_text
from core.config import EngineConfig
from core.contracts import AttentionBackend, Checkpoint, KVSpec, Model, QuantMethod, Refusal, Tokenizer
from core.decode_graphs import Sizes
from core.device import device_module
from core.engine import Engine
from core.engine_info import EngineInfo
from core.errors import ConfigError, CoreError
from core.kv_memory import GPU_SPARE, kv_bytes, size_memory
from core.memory import give_back, letting_go
from core.model_loader import BuildAttempt, BuildContext, build_model
from core.plugins import PluginHost
from core.runner import Runner
from core.sampler import Sampler
from core.scheduler import Scheduler, SchedulerLimits
from core.spec import ModelSpec
from core.speculation import Drafter, LookupLimits

logger = logging.getLogger("core_serve")
MIXED_PREFILL_ON_CPU = 16  # tokens
DEFAULT_MODEL_LEN = 2048  # tokens, where a config states none


def build_engine(
    config: EngineConfig, host: PluginHost | None = None, hand_over: Callable[[Tokenizer | None], None] | None = None
) -> Engine:
    """Build an engine. Raises CoreError where the model cannot be served as asked.

    `hand_over` is given the tokenizer as soon as it is open, long before the model is built.
    """
    host = host or PluginHost.load(disable=config.disable_plugins)
    config = sized(config)
    plan = make_plan(config, host)
    # Before the weights: making the tokenizer of a large vocabulary takes 200 MB for a moment.
    tokenizer = None if config.skip_tokenizer_init else host.tokenizer(plan.checkpoint.spec, config)
    if hand_over is not None:
        hand_over(tokenizer)
    model, attempts = build_model(plan.models.eligible, plan.checkpoint, plan.context)
    plan.context.shared.clear()  # what the next bids would have gone on with
    letting_go(plan.checkpoint)()
    give_back()
    return _assemble(config, host, plan, tokenizer, model, attempts)


@dataclass(frozen=True)
class BuildPlan:
    """Everything that is known before a model is built."""

    checkpoint: Checkpoint
    attention: Choice[AttentionBackend]
    models: Choice[Model]
    context: BuildContext


def make_plan(config: EngineConfig, host: PluginHost) -> BuildPlan:
    """Open the checkpoint and ask the plugins; loads no weights."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    checkpoint = host.open_checkpoint(config.model or demo_path(), config)
    spec = checkpoint.spec
    attention = host.choose_attention(spec, config)
    models = host.choose_model(spec, config)
    quant_method = host.quant_method(spec, config)
    return BuildPlan(checkpoint, attention, models, _context(config, host, spec, attention, quant_method))


def demo_path() -> str:
    from core.demo import demo_model_path

    return demo_model_path()


def _context(
    config: EngineConfig,
    host: PluginHost,
    spec: ModelSpec,
    attention: Choice[AttentionBackend],
    quant_method: QuantMethod | None,
) -> BuildContext:
    device = torch.device(choose_device(config.device))

    def make_attention() -> AttentionBackend:
        built = attention.winner.bid.build()
        if isinstance(built, Refusal):
            raise CoreError(f"Attention backend {attention.winner.bid.name} declined: {built.reason}")
        return built

    return BuildContext(
        options=config,
        device=device,
        dtype=choose_dtype(config.dtype, spec, device),
        make_attention=make_attention,
        quant_method=quant_method,
        kernels=host.kernels(str(device), config),
    )


def choose_device(name: str) -> str:
    """Return the device for "auto", or the one asked for. Raises ConfigError if torch has none of that kind."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device {name!r} was asked for, but torch sees no GPU. Use --device cpu, or install a CUDA torch."
        )
    try:
        torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown to torch; use cpu or cuda.") from error
    return name


def choose_dtype(name: str, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """float32 on a CPU, where half types are slow and less exact; elsewhere the checkpoint's half type or bfloat16."""
    if name == "auto":
        half = "float16" if (spec.torch_dtype or "").removeprefix("torch.") == "float16" else "bfloat16"
        name = "float32" if device.type == "cpu" else half
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"The checkpoint's dtype {name!r} is no torch dtype; choose one with --dtype.")
    return found


def _assemble(
    config: EngineConfig,
    host: PluginHost,
    plan: BuildPlan,
    tokenizer: Tokenizer | None,
    model: Model,
    attempts: Sequence[BuildAttempt],
) -> Engine:
    spec, context, attention_name = plan.checkpoint.spec, plan.context, plan.attention.winner.bid.name
    max_model_len = choose_model_len(config, spec)
    drafter = make_drafter(config, model)
    specs = cache_specs(model, config.kv_cache_dtype)
    chunked = model.features.chunked_prefill
    step = config.max_num_batched_tokens if chunked else max(config.max_num_batched_tokens, max_model_len)
    device = device_module(context.device)
    prefix_caching = config.enable_prefix_caching and model.features.prefix_caching
    spare = GPU_SPARE if device.stages and prefix_caching else 1
    memory = size_memory(config, specs, max_model_len, step, kv_bytes(config, device), spare)
    max_model_len = min(max_model_len, memory.num_blocks * config.block_size)  # no request can be longer than the pool
    attention = context.make_attention()
    if specs:
        attention.allocate(specs, memory.by_layer(specs), config.block_size)
    if config.enable_prefix_caching and not prefix_caching:
        logger.info(
            "prefix caching is off: what %s keeps of a token depends on more than the tokens before it, or is not in "
            "blocks", model.impl_name,
        )  # fmt: skip
    limits = SchedulerLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        max_mixed_prefill_tokens=mixed_prefill_tokens(config, context.device),
        max_num_waiting=config.max_num_waiting,
        chunked_prefill=chunked,
        prefix_caching=prefix_caching,
        restart_after=model.features.restart_after,
    )
    eos = sorted({*spec.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())})
    info = EngineInfo(
        model_name=config.served_model_name or spec.name,
        model_path=str(spec.path),
        impl_name=model.impl_name,
        attention_name=attention_name,
        dtype=str(context.dtype).removeprefix("torch."),
        device=str(context.device),
        max_model_len=max_model_len,
        vocab_size=model.vocab_size,
        num_blocks=memory.num_blocks,
        block_size=config.block_size,
        prefix_caching=prefix_caching,
        quantization=context.quant_method.name if context.quant_method else None,
        plugins=host.resolved,
        attempts=tuple((attempt.name, attempt.refusal) for attempt in attempts),
        explanation=explain_text(plan.models),
    )
    logger.info(
        "model: %s · attention: %s · quantizer: %s · kernels: %s · %s on %s · %d blocks of %d tokens%s",
        info.impl_name, attention_name, info.quantization or "none",
        context.kernels.name if context.kernels else "torch", info.dtype, info.device, info.num_blocks,
        config.block_size, "" if config.kv_cache_dtype == "auto" else f" in {config.kv_cache_dtype}",
    )  # fmt: skip
    for reach, blocks in memory.windows.items():
        logger.info("layers of %s: %d blocks; what lies further back is given back", reach, blocks)
    graph_sizes = Sizes(config.max_num_seqs, max_model_len, config.block_size) if config.enable_cuda_graph else None
    reaches = tuple(memory.windows)
    runner = Runner(model, attention, config.block_size, device, reaches, graph_sizes, config.enable_head_screen)
    pools = memory.pools(config.block_size)
    scheduler = Scheduler(BlockPool(memory.num_blocks, config.block_size), limits, pools, drafter)
    sampler = Sampler(model.vocab_size, eos, device)
    return Engine(info, config, host, runner, scheduler, sampler, tokenizer, eos)


def sized(config: EngineConfig) -> EngineConfig:
    """Fill in what of a step's sizes was left to the device."""
    on_cpu = torch.device(choose_device(config.device)).type == "cpu"
    seqs, tokens = (64, 512) if on_cpu else (256, 4096)
    return replace(
        config,
        max_num_seqs=config.max_num_seqs or seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or tokens,
    )


def offline(config: EngineConfig) -> EngineConfig:
    """Let steps that decode take prompts up to their whole budget, unless told otherwise: nobody reads along."""
    if config.max_mixed_prefill_tokens is not None:
        return config
    return replace(config, max_mixed_prefill_tokens=sized(config).max_num_batched_tokens)


def mixed_prefill_tokens(config: EngineConfig, device: torch.device) -> int | None:
    """Return how many tokens of prompts a step runs beside decodes; None: its whole budget.

    A GPU computes hundreds of tokens in the time it takes to read the weights; on a CPU each costs time of its own.
    """
    default = MIXED_PREFILL_ON_CPU if device.type == "cpu" else None
    return config.max_mixed_prefill_tokens or default


def make_drafter(config: EngineConfig, model: Model) -> Drafter | None:
    """Return what guesses tokens, None if it is off. Raises ConfigError for a model that cannot take a token back."""
    if not config.speculative_ngram:
        return None
    features, reason = model.features, None
    if features.restart_after is not None:
        reason = f"it computes a text anew when it grows past {features.restart_after} tokens"
    elif not features.prefix_caching:
        reason = "what it keeps of a token is not in blocks, or depends on the length of the text"
    elif not features.chunked_prefill:
        reason = "it cannot run several tokens behind what it has computed"
    if reason is not None:
        raise ConfigError(
            f"speculative_ngram {config.speculative_ngram} was asked for, but {model.impl_name} cannot take back a "
            f"token that was guessed wrong: {reason}. Leave it at 0."
        )
    limits = LookupLimits(config.speculative_ngram, config.speculative_ngram_min, config.speculative_num_draft_tokens)
    return Drafter(limits)


def cache_specs(model: Model, dtype: str) -> list[KVSpec]:
    """Return what each layer keeps, in the dtype asked for. Raises ConfigError if the model keeps no K/V here."""
    specs = list(model.kv_specs())
    if dtype == "auto":
        return specs
    if not specs:
        raise ConfigError(
            f"kv_cache_dtype {dtype} was asked for, but {model.impl_name} keeps its own state and no K/V in blocks; "
            "leave it at auto."
        )
    return [replace(spec, dtype=getattr(torch, dtype)) for spec in specs]


def choose_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    """The model's own limit, or a smaller one that was asked for. Raises ConfigError for a larger one."""
    own = spec.max_context
    if config.max_model_len is None:
        return own or DEFAULT_MODEL_LEN
    if own is not None and config.max_model_len > own:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is longer than the {own} tokens that the model's config allows. "
            "Ask for less, or change max_position_embeddings (and rope scaling) in the checkpoint's config."
        )
    return config.max_model_len
