"""EngineInfo: what serves, for logs, /v1/models and LLM. Crosses the process border; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineInfo:
    """A running engine's model, its implementation and its limits."""

    model_name: str
    model_path: str
    impl_name: str
    attention_name: str
    dtype: str
    device: str
    max_model_len: int  # tokens
    vocab_size: int
    num_blocks: int
    block_size: int  # tokens
    prefix_caching: bool
    quantization: str | None
    plugins: tuple[tuple[str, str], ...]  # (name, version)
    attempts: tuple[tuple[str, str | None], ...]  # bids that were built: (name, why it declined; None: it serves)
    explanation: str  # the ranked bids, as `core-serve explain` prints them
