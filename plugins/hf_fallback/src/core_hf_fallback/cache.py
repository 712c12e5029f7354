"""Tier cache: one transformers cache for each request. Slow, and right for whatever `generate` runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.batch import Batch
from core.contracts import KVSpec, ModelFeatures
from core_hf_fallback.module_state import ModuleState
from core_hf_fallback.paged import logits_of


@dataclass
class Text:
    """What `generate` would carry from step to step, for one request or for several side by side."""

    ids: Tensor  # [rows, tokens so far]
    arguments: dict[str, Any]  # the cache among them
    in_modules: dict[str, Any]  # state that the model keeps in its modules instead


class Stepper:
    """Goes through `generate` of one module step by step, for any number of texts in turn."""

    def __init__(self, module: Any, max_model_len: int) -> None:
        self.module, self.max_model_len = module, max_model_len
        self.device: torch.device = next(module.parameters()).device
        self.module_state = ModuleState(module)
        text = torch.tensor([[3, 4, 5]], device=self.device)
        self.module_state.learn(lambda: self.first(text, all_logits=False))

    def first(self, ids: Tensor, all_logits: bool) -> tuple[Text, Tensor]:
        """Run a whole prompt [rows, tokens]; return its text and logits [rows, tokens or 1, vocab]."""
        config, arguments = prepare(self.module, ids, self.max_model_len)
        keeps = "logits_to_keep" in arguments
        if keeps and all_logits:
            arguments["logits_to_keep"] = 0
        self.module_state.reset()
        out = self.module._prefill(ids, config, arguments)
        if keeps:
            arguments["logits_to_keep"] = 1
        text, logits = self._text(ids, arguments, out), logits_of(out)
        if all_logits and logits.shape[1] < ids.shape[1]:  # some models keep the last one whatever is asked
            self.module_state.reset()
            logits = logits_of(self.module(input_ids=ids, use_cache=False))
        return text, logits

    def next(self, text: Text, ids: Tensor, mask: Tensor | None = None) -> tuple[Text, Tensor]:
        """Run one more token [rows, 1]; `mask` [rows, tokens] is 0 at padding. Uses up `text`.

        A newer `generate` drops a mask of ones, an older one carries it along: there it is state like any, which gets
        its zeros when texts are put side by side, and `mask` would say the same.
        """
        ids = torch.cat([text.ids, ids], 1)
        if text.arguments.get("attention_mask") is not None:
            mask = None
        if mask is not None:
            text.arguments["attention_mask"] = mask
        self.module_state.put(text.in_modules)
        inputs = self.module.prepare_inputs_for_generation(ids, next_sequence_length=1, **text.arguments)
        out = self.module(**inputs, return_dict=True)
        if mask is not None:
            text.arguments["attention_mask"] = None
        return self._text(ids, text.arguments, out), logits_of(out)

    def _text(self, ids: Tensor, arguments: dict[str, Any], out: Any) -> Text:
        arguments = self.module._update_model_kwargs_for_generation(out, arguments, is_encoder_decoder=False)
        return Text(ids, arguments, self.module_state.take())


class CacheModel:
    """A `core.contracts.Model` that steps through `generate` request by request.

    A prompt runs whole, since many modules with recurrent state take either a whole text or a single token.
    """

    impl_name = "transformers/cache"
    features = ModelFeatures(chunked_prefill=False, prefix_caching=False)

    def __init__(self, stepper: Stepper, vocab_size: int) -> None:
        self.stepper = stepper
        self.vocab_size = vocab_size
        self.texts: dict[str, Text] = {}

    def kv_specs(self) -> Sequence[KVSpec]:
        return []

    def release(self, request_id: str) -> None:
        self.texts.pop(request_id, None)

    def forward(self, batch: Batch) -> Tensor:
        wanted = wanted_rows(batch)
        return torch.cat([self._run_one(batch, row, wanted[row]) for row in range(batch.num_requests)])

    def _run_one(self, batch: Batch, row: int, wanted: list[int]) -> Tensor:
        entry = batch.scheduled[row]
        ids = batch.token_ids[None, batch.query_starts[row] : batch.query_starts[row + 1]]
        if entry.start == 0:
            text, logits = self.stepper.first(ids, all_logits=wanted != [ids.shape[1] - 1])
        else:
            text, logits = self.stepper.next(self.texts[entry.request.id], ids)
        self.texts[entry.request.id] = text
        return rows_of(logits[0], ids.shape[1], wanted)


def wanted_rows(batch: Batch) -> list[list[int]]:
    """Return, by request, which of its new tokens' logits are wanted."""
    rows = batch.logit_rows.tolist()
    starts = batch.query_starts
    return [
        [token - starts[row] for token in rows if starts[row] <= token < starts[row + 1]]
        for row in range(batch.num_requests)
    ]


def rows_of(logits: Tensor, count: int, wanted: list[int]) -> Tensor:
    """Pick the wanted of `count` tokens; `logits` may hold the last ones only."""
    return logits[[len(logits) - count + index for index in wanted]]


def prepare(module: Any, ids: Tensor, max_length: int) -> tuple[Any, dict[str, Any]]:
    """Let `generate` itself prepare its first step for ids [rows, tokens]; return its config and model arguments."""
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
