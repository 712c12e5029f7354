"""EngineConfig: what the user asked for. Frozen and closed; what is measured later is passed on, not written back."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from core.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineConfig:
    """Options of one engine. Raises ConfigError when a value cannot be right."""

    model: str | None = None  # folder or file; None = the embedded demo model
    model_impl: str = "auto"  # auto, native, transformers, or the name of an implementation
    dtype: str = "auto"  # auto = float32 on CPU; on GPU the checkpoint's half type, else bfloat16
    device: str = "auto"  # auto = cuda when there is one, else cpu
    quantization: str | None = None
    attention_backend: str | None = None  # None = CORE_ATTENTION_BACKEND, else the highest bid
    trust_remote_code: bool = False
    skip_tokenizer_init: bool = False
    tokenizer: str | None = None  # folder; None = the model's own
    chat_template: str | None = None  # file; None = the model's own
    served_model_name: str | None = None  # None = the last part of the path
    max_model_len: int | None = None  # tokens; None = the model's own limit
    max_num_seqs: int = 0  # requests that run at a time; 0 = 64 on CPU, 256 on GPU
    max_num_batched_tokens: int = 0  # token budget of a step; 0 = 512 on CPU, 4096 on GPU
    max_mixed_prefill_tokens: int | None = None  # of prompts, in a step that decodes too; None = 16 on CPU, else all
    max_num_waiting: int = 4096  # requests that may queue
    enable_prefix_caching: bool = True
    block_size: int = 16  # tokens in a KV block
    num_blocks: int | None = None  # KV blocks; None = from kv_cache_memory
    kv_cache_memory: int | None = None  # bytes for K/V at the most; None = 2 GiB on CPU, mem_fraction_static on GPU
    mem_fraction_static: float | None = None  # of a GPU's memory, for weights and K/V; None = 0.88
    kv_cache_dtype: str = "auto"  # of K/V in the cache; auto = what the model computes in
    enable_cuda_graph: bool = True  # decode steps as graphs, where device, model and backend can
    enable_head_screen: bool = True  # where only the highest logit is wanted, a copy of the head rules others out
    speculative_ngram: int = 0  # longest n-gram looked up in a request's own text to guess its next tokens; 0 = off
    speculative_ngram_min: int = 2  # the shortest
    speculative_num_draft_tokens: int = 5  # the most guessed for a request in a step
    tensor_parallel_size: int = 1
    seed: int = 0  # for requests that give none
    disable_plugins: tuple[str, ...] = ()
    disable_patches: tuple[str, ...] = ()  # of the transformers fallback
    prefer: tuple[str, ...] = ()  # settles ties between bids
    num_threads: int | None = None  # CPU threads of the engine; None = torch's own choice
    extra: dict[str, Any] = field(default_factory=dict)  # options of plugins, by their own names

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
        if self.kv_cache_dtype not in DTYPES:
            raise ConfigError(f"kv_cache_dtype {self.kv_cache_dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
        if self.tensor_parallel_size != 1:
            raise ConfigError("tensor_parallel_size above 1 is not supported yet; leave it at 1.")
        positive = (
            "max_num_waiting", "block_size",
            "speculative_ngram_min", "speculative_num_draft_tokens",
        )  # fmt: skip
        optional = ("kv_cache_memory", "max_model_len", "num_blocks", "num_threads", "max_mixed_prefill_tokens")
        by_device = ("max_num_seqs", "max_num_batched_tokens")
        for name in (*positive, *optional, *by_device):
            value = getattr(self, name)
            if (value is None and name in optional) or (value == 0 and name in by_device and value is not False):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
        fraction = self.mem_fraction_static
        if fraction is not None and not 0 < fraction < 1:
            raise ConfigError(f"mem_fraction_static must lie between 0 and 1, got {fraction!r}.")
        if fraction is not None and self.kv_cache_memory is not None:
            raise ConfigError("mem_fraction_static and kv_cache_memory both size the K/V memory; give one of them.")
        self._check_speculation()
        for name in ("disable_plugins", "disable_patches", "prefer"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))

    def _check_speculation(self) -> None:
        longest, shortest = self.speculative_ngram, self.speculative_ngram_min
        if not isinstance(longest, int) or isinstance(longest, bool) or longest < 0:
            raise ConfigError(f"speculative_ngram must be 0 (off) or a positive integer, got {longest!r}.")
        if 0 < longest < shortest:
            raise ConfigError(
                f"speculative_ngram {longest} is shorter than speculative_ngram_min {shortest}; nothing would be "
                "looked up. Raise the one or lower the other."
            )

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """Make a config of keyword options; an unknown one is a ConfigError with the nearest name."""
        known = [entry.name for entry in fields(cls)]
        for name in options:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."
                raise ConfigError(f"Unknown option {name!r}.{hint}")
        return cls(**options)

    @property
    def attention_backend_name(self) -> str | None:
        """The backend asked for by option or by the environment."""
        return self.attention_backend or os.environ.get("CORE_ATTENTION_BACKEND") or None
