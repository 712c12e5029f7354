"""What plain transformers says: its own module, loaded by its own loader, one text at a time.

Logits and hidden states are kept for as many positions as a fixed amount of memory holds: a vocabulary of 262,144
makes a megabyte of logits a token.

Each text runs twice, the second time with its embeddings off by the last bit: real models amplify rounding at some
positions by ten thousand and more, and how far plain itself moves there says how far any right implementation may.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.contracts import Checkpoint, QuantMethod
from core.errors import CheckpointError
from core.plain_module import plain_module
from core.verify_layers import LayerRecorder, decoder_layers
from core.verify_measure import errors

LOGIT_BYTES = 512 * 1024**2
HIDDEN_BYTES = 1024**3
FEW = 16  # tokens


@dataclass(frozen=True)
class PlainText:
    """One text, and what the plain module gives for it."""

    ids: list[int]
    logits_at: Tensor  # [rows] int64, positions, ascending
    logits: Tensor  # [rows, vocab] float32
    hidden_at: Tensor  # [kept] int64, positions, ascending
    hidden: list[Tensor]  # by layer, [kept, hidden] float32; empty if the module has no list of layers
    logits_noise: Tensor  # [rows], how far rounding moves the logits, in standard deviations
    hidden_noise: list[Tensor]  # by layer, [kept]


@dataclass(frozen=True)
class PlainAnswer:
    """What `generate` answers greedily."""

    prompt: list[int]
    token_ids: list[int]
    logits: Tensor  # [tokens, vocab] float32


class PlainModel:
    """A transformers module that nobody touched."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.layer_names = recorder.names if (recorder := self._layers(module)) else []

    @property
    def vocab_size(self) -> int:
        """The number of token ids that the model takes."""
        embedding = self.module.get_input_embeddings()
        return int(getattr(embedding, "num_embeddings", 0) or self.module.config.get_text_config().vocab_size)

    def _layers(self, module: Any) -> LayerRecorder | None:
        """The text's layers, where the config counts them: towers for images may have more."""
        count = getattr(module.config.get_text_config(), "num_hidden_layers", None)
        return decoder_layers(module, count) or decoder_layers(module)

    def run(self, texts: Sequence[list[int]], seconds: float) -> tuple[list[PlainText], list[int]]:
        """Run texts, the shortest first; return what fits into the time, and the lengths that do not."""
        done: list[PlainText] = []
        deadline, per_token = time.monotonic() + seconds, 0.0
        for ids in texts:
            begun = time.monotonic()
            if done and len(ids) * per_token > deadline - begun:
                return done, [len(text) for text in texts[len(done) :]]
            done.append(self._run_one(ids, len(texts)))
            per_token = (time.monotonic() - begun) / max(len(ids), FEW)  # a few tokens take as long as one
        return done, []

    @torch.inference_mode()
    def _run_one(self, ids: list[int], num_texts: int) -> PlainText:
        at = _kept(len(ids), _affordable(LOGIT_BYTES, self.vocab_size, num_texts))
        at, logits, hidden = self._forward(ids, at, jitter=False)
        width = sum(layer.shape[-1] for layer in hidden)
        hidden_at = _kept(len(ids), _affordable(HIDDEN_BYTES, width, num_texts))
        hidden = [layer[hidden_at] for layer in hidden]
        _, moved, moved_hidden = self._forward(ids, at, jitter=True)
        noise = [errors(layer, other[hidden_at]) for layer, other in zip(hidden, moved_hidden, strict=True)]
        return PlainText(ids, at, logits, hidden_at, hidden, errors(logits, moved), noise)

    def _forward(self, ids: list[int], at: Tensor, jitter: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return those of the positions `at` that have logits, these logits, and each layer's [tokens, hidden]."""
        module = self._alone()
        recorder = self._layers(module) or LayerRecorder([], [])
        device = next(module.parameters()).device
        known = inspect.signature(module.forward).parameters
        offered = {"position_ids": torch.arange(len(ids), device=device)[None], "logits_to_keep": at.to(device)}
        given = {name: value for name, value in offered.items() if name in known}
        if jitter:  # on a copy of the module, which nobody sees again
            module.get_input_embeddings().register_forward_hook(_jitter)
        with recorder.recording():
            out = module(input_ids=torch.tensor([ids], device=device), use_cache=False, **given)
        logits: Tensor = (out.logits if hasattr(out, "logits") else out[0])[0]
        if "logits_to_keep" not in known or len(logits) != len(at):
            first = len(ids) - len(logits)  # a few models give the last logits only
            at = at[at >= first]
            logits = logits[(at - first).to(device)]
        return at, logits.float().cpu(), recorder.rows(len(ids)) or []

    def answer(self, prompt: list[int], max_tokens: int) -> PlainAnswer:
        """Let `generate` continue a prompt greedily, past any end of text."""
        module = self._alone()
        ids = torch.tensor([prompt], device=next(module.parameters()).device)
        out = module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack(out.logits, 1)[0].float().cpu()
        return PlainAnswer(prompt, out.sequences[0, len(prompt) :].tolist(), logits)

    def _alone(self) -> Any:
        """A fresh copy over the same weights: some modules carry state from one text into the next."""
        return copy.deepcopy(self.module, {id(weight): weight for weight in self.module.parameters()})


def _jitter(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
    """Move values by about the last bit of their type, the same way every time."""
    noise = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0))
    return embedded * (1 + torch.finfo(embedded.dtype).eps * noise).to(embedded)


def _affordable(memory: int, width: int, num_texts: int) -> int:
    """How many positions a text may keep, of `width` float32 numbers each."""
    return max(memory // num_texts // (4 * max(width, 1)), 2)


def _kept(length: int, most: int) -> Tensor:
    """All positions; or the last ones, where windows and chunks cut, and as many from all over the text."""
    if length <= most:
        return torch.arange(length)
    spread = torch.linspace(0, length - 1, most - most // 2).long()
    kept: Tensor = torch.cat([spread, torch.arange(length - most // 2, length)]).unique()
    return kept


# ------------------------------------------------------------------------------------------------ loading


def load_plain(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    method: QuantMethod | None = None,
) -> PlainModel:
    """Load a checkpoint as transformers does. Raises CheckpointError with transformers' own reason."""
    import transformers

    try:
        module = plain_module(checkpoint, dtype, trust_remote_code, method)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"transformers cannot load {checkpoint.spec.path} to compare with: {type(error).__name__}: {error}"
        ) from error
    # Nothing but the model's own argmax: a checkpoint may ask for penalties, or to stop at an end of text.
    module.generation_config = transformers.GenerationConfig(pad_token_id=0)
    plain: nn.Module = module.to(device)
    return PlainModel(plain)
