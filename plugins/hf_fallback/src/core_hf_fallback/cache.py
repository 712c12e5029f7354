"""Tier cache: one transformers cache for each request. Slow, and right for whatever `generate` runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.batch import Batch
from core.contracts import KVSpec, ModelFeatures
from core_hf_fallback.paged import logits_of


@dataclass
class Text:
    """What `generate` would carry from step to step for one request."""

    ids: Tensor  # [1, tokens so far]
    arguments: dict[str, Any]  # its cache among them


class CacheModel:
    """A `core.contracts.Model` that steps through `generate` request by request.

    A prompt runs whole, since many modules with recurrent state take either a whole text or a single token.
    """

    impl_name = "transformers/cache"
    features = ModelFeatures(chunked_prefill=False, prefix_caching=False)

    def __init__(self, module: nn.Module, vocab_size: int, max_model_len: int) -> None:
        self.module: Any = module
        self.vocab_size, self.max_model_len = vocab_size, max_model_len
        self.texts: dict[str, Text] = {}

    def kv_specs(self) -> Sequence[KVSpec]:
        return []

    def release(self, request_id: str) -> None:
        self.texts.pop(request_id, None)

    def forward(self, batch: Batch) -> Tensor:
        wanted = set(batch.logit_rows.tolist())
        rows = []
        for row, entry in enumerate(batch.scheduled):
            start, end = batch.query_starts[row], batch.query_starts[row + 1]
            inside = [token - start for token in range(start, end) if token in wanted]
            ids = batch.token_ids[None, start:end]
            logits = (
                self._first(entry.request.id, ids, inside) if entry.start == 0 else self._next(entry.request.id, ids)
            )
            rows.append(logits[-(end - start) :][[index - (end - start) for index in inside]])
        return torch.cat(rows)

    def _first(self, request_id: str, ids: Tensor, wanted: list[int]) -> Tensor:
        """Run a whole prompt; return the logits of its last tokens, all of them where more than the last is wanted."""
        config, arguments = prepare(self.module, ids, self.max_model_len)
        if wanted != [ids.shape[1] - 1] and "logits_to_keep" in arguments:
            arguments["logits_to_keep"] = 0
        out = self.module._prefill(ids, config, arguments)
        if "logits_to_keep" in arguments:
            arguments["logits_to_keep"] = 1
        return self._keep(request_id, ids, arguments, out)

    def _next(self, request_id: str, ids: Tensor) -> Tensor:
        text = self.texts[request_id]
        ids = torch.cat([text.ids, ids], 1)
        inputs = self.module.prepare_inputs_for_generation(ids, next_sequence_length=1, **text.arguments)
        return self._keep(request_id, ids, text.arguments, self.module(**inputs, return_dict=True))

    def _keep(self, request_id: str, ids: Tensor, arguments: dict[str, Any], out: Any) -> Tensor:
        arguments = self.module._update_model_kwargs_for_generation(out, arguments, is_encoder_decoder=False)
        self.texts[request_id] = Text(ids, arguments)
        return logits_of(out)[0]


def prepare(module: Any, ids: Tensor, max_length: int) -> tuple[Any, dict[str, Any]]:
    """Let `generate` itself prepare its first step for ids [1, tokens]; return its config and its model arguments."""
    prepared: dict[str, Any] = {}

    def stop_here(model: Any, input_ids: Tensor, generation_config: Any, **arguments: Any) -> Tensor:
        for name in ("logits_processor", "stopping_criteria", "synced_gpus", "streamer"):
            arguments.pop(name, None)
        prepared.update(config=generation_config, arguments=arguments)
        return input_ids

    module.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=stop_here,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_length=max(max_length, ids.shape[1]) + 1,
        pad_token_id=0,
    )
    return prepared["config"], prepared["arguments"]
