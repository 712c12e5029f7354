"""Tier paged: the flat row of tokens goes through the whole ...ForCausalLM, attention runs on the host's paged K/V."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.batch import Batch
from core.contracts import KVSpec, ModelFeatures
from core_hf_fallback.head_screen import HeadScreen
from core_hf_fallback.interface import NAME, Binding, register, use_attention
from core_hf_fallback.ropes import Ropes, text_lengths
from core_hf_fallback.taint import CountedTokens


class NotPaged(Exception):
    """Why a model cannot be served by this tier."""


class PagedModel:
    """A `core.contracts.Model` whose only state is K/V in the host's blocks."""

    impl_name = "transformers/paged"

    def __init__(self, module: nn.Module, binding: Binding, ropes: Ropes, ids: Tensor, length: int) -> None:
        """Find the layers by one recording forward over `ids`, the beginning of a text of `length` tokens.

        Raises NotPaged with the reason.
        """
        register()
        self.module, self.binding, self.ropes = module, binding, ropes
        # Nobody knows what else somebody's module reads, so its graphs are on trial.
        self.features = ModelFeatures(
            prefix_caching=not ropes,
            restart_after=ropes.restart_after,
            captures_decode=not ropes,
            captures_on_trial=True,
        )
        use_attention(module, NAME)
        self.screen: HeadScreen | None = None
        self.keeps_logits = "logits_to_keep" in inspect.signature(module.forward).parameters
        self.recorded = self._record(ids, length)  # logits [ids, vocab]
        self.vocab_size = self.recorded.shape[-1]
        if self.binding.problems:
            raise NotPaged(self.binding.problems[0])
        if self.binding.counting_layers:
            layer = self.binding.counting_layers[0]
            raise NotPaged(f"layer {layer} counts the tokens of the batch instead of taking positions")
        if not self.binding.specs:
            raise NotPaged("no layer calls transformers' attention interface")

    def forget_recording(self) -> None:
        """Free what the recording forward gave: the logits of a large vocabulary are a megabyte a token."""
        del self.recorded
        self.binding.recorded.clear()

    def kv_specs(self) -> Sequence[KVSpec]:
        return self.binding.specs

    def forward(self, batch: Batch) -> Tensor:
        rows = batch.logit_rows if len(batch.logit_rows) else batch.logit_rows.new_zeros(1)
        try:
            with self.ropes.flat(text_lengths(batch, self.ropes.restart_after) if self.ropes else []):
                logits = self._served(batch, rows)
        finally:
            self.binding.batch = None  # whoever looks at the module between forwards finds it as it is
        return logits[: len(batch.logit_rows)]

    def _served(self, batch: Batch, rows: Tensor) -> Tensor:
        def forward() -> Tensor:
            self.binding.start(batch)
            return self._module_logits(batch.token_ids, batch.positions, rows)

        found = forward() if self.screen is None else self.screen.run(forward, batch.only_highest)
        return self._of_rows(found[0], rows)

    def release(self, request_id: str) -> None:
        """All state is in the host's blocks."""

    def _record(self, ids: Tensor, length: int) -> Tensor:
        self.binding.start(None)
        positions = torch.arange(len(ids), device=ids.device)
        lengths = self.ropes.flat([length] * len(ids))
        with torch.inference_mode(), lengths, CountedTokens(len(ids)) as self.binding.counted:
            logits = self._of_rows(self._module_logits(ids, positions, positions)[0], positions)
        self.binding.counted = None
        return logits

    def _module_logits(self, ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """Return logits [1, tokens or rows, vocab]."""
        keep = {"logits_to_keep": rows} if self.keeps_logits else {}
        return logits_of(self.module(input_ids=ids[None], position_ids=positions[None], use_cache=False, **keep))

    def _of_rows(self, logits: Tensor, rows: Tensor) -> Tensor:
        return logits if self.keeps_logits and len(logits) == len(rows) else logits[rows]


def logits_of(out: Any) -> Tensor:
    """Logits [batch, tokens, vocab] of a model's output; a few models return a plain tuple."""
    logits: Tensor = out.logits if hasattr(out, "logits") else out[0]
    return logits
