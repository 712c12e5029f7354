"""The kit that plugin authors test with: tiny checkpoints, a comparison with transformers, a model without weights.

    def test_my_family_answers_like_transformers():
        assert_matches_transformers("llama", model_impl="my_models")

torch and transformers are imported where they are used.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError, CoreError
from core.testing_checkpoints import packed_checkpoint, tiny_checkpoint
from core.testing_configs import VOCAB
from core.testing_echo import EchoCheckpoint, EchoModel, EchoPlugin

if TYPE_CHECKING:
    from torch import Tensor

    from core.llm import LLM
    from core.outputs import CompletionOutput

__all__ = [
    "Answer",
    "EchoCheckpoint",
    "EchoModel",
    "EchoPlugin",
    "NoReference",
    "VOCAB",
    "answers_of",
    "assert_matches_transformers",
    "assert_same_answers",
    "assert_serves",
    "default_prompts",
    "packed_checkpoint",
    "tight_options",
    "tiny_checkpoint",
    "transformers_answers",
]


class NoReference(CoreError):
    """Why there is nothing to compare with: transformers itself cannot generate with this model."""


@dataclass(frozen=True)
class Answer:
    """What transformers' `generate` gives for one prompt, greedily."""

    token_ids: list[int]
    logprobs: Tensor  # [tokens, vocab] float32, of every token of the vocabulary


def assert_matches_transformers(
    model: str | Path,
    model_impl: str = "auto",
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    max_tokens: int = 10,
    tolerance: float = 2e-3,
    overrides: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> str:
    """Serve `model` and compare greedy tokens and their logprobs with `generate`; return who served it.

    `model` is a checkpoint's folder, or a model type, of which `tiny_checkpoint(model, ..., **overrides)` is made.
    The prompts run together, in blocks of 4 tokens and steps of at most 7, first with a cold prefix cache, then with
    what that left in it. `options` are LLM's and win over these. Where transformers itself is undecided between two
    tokens by less than `tolerance` (in nats, as logprobs are), a prompt's comparison ends. Raises AssertionError;
    ConfigError where no tiny checkpoint can be built, NoReference where `generate` itself fails.
    """
    from core.llm import LLM

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(model) if Path(model).is_dir() else tiny_checkpoint(str(model), scratch, **(overrides or {}))
        asked = [list(prompt) for prompt in prompts or default_prompts()]
        wanted = transformers_answers(folder, asked, max_tokens, trust_remote_code)
        tight = tight_options(model_impl) | {"trust_remote_code": trust_remote_code}
        with LLM(model=str(folder), **{**tight, **options}) as llm:
            assert_serves(llm, asked, wanted, tolerance)
            return llm.model_impl_name


def assert_matches_dequantized(
    model: str | Path,
    model_impl: str = "auto",
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    max_tokens: int = 10,
    tolerance: float = 2e-3,
    **options: Any,
) -> str:
    """Serve a quantized model and compare with `generate` of the same model with its weights as floats.

    `model` is a checkpoint's folder or file; with the option `quantization` a float one that is quantized on the fly.
    Otherwise like `assert_matches_transformers`. Returns who served it.
    """
    import torch

    from core.config import EngineConfig
    from core.llm import LLM
    from core.plain_module import plain_module
    from core.plugins import PluginHost

    asked = [list(prompt) for prompt in prompts or default_prompts()]
    config = EngineConfig.from_options(model=str(model), **{**tight_options(model_impl), **options})
    host = PluginHost.load(disable=config.disable_plugins)
    checkpoint = host.open_checkpoint(str(model), config)
    method = host.quant_method(checkpoint.spec, config)
    if method is None:
        raise ConfigError(f"{model} is not quantized, and no quantization is asked for.")
    module = plain_module(checkpoint, torch.float32, config.trust_remote_code, method)
    module.generation_config.eos_token_id = list(checkpoint.spec.eos_token_ids) or None
    wanted = answers_of(module, asked, max_tokens)
    with LLM(model=str(model), **{**tight_options(model_impl), **options}) as llm:
        assert_serves(llm, asked, wanted, tolerance)
        return llm.model_impl_name


def tight_options(model_impl: str) -> dict[str, Any]:
    """Return LLM's options for a comparison: blocks and steps so small that short prompts go through several."""
    tight: dict[str, Any] = {"block_size": 4, "max_num_batched_tokens": 7, "dtype": "float32", "device": "cpu"}
    return tight | {"skip_tokenizer_init": True, "model_impl": model_impl}


def assert_serves(llm: LLM, prompts: list[list[int]], wanted: Sequence[Answer], tolerance: float) -> None:
    """Compare with what `llm` answers to all prompts together, first with a cold prefix cache, then with its own."""
    for cache in ("a cold prefix cache", "a warm prefix cache"):
        _compare(llm, prompts, wanted, tolerance, cache)


def assert_same_answers(found: Sequence[Answer], wanted: Sequence[Answer], tolerance: float) -> None:
    """Compare two lists of transformers' answers, as answers of an engine are compared."""
    from core.outputs import CompletionOutput, Logprob

    for at, (one, other) in enumerate(zip(found, wanted, strict=True)):
        steps = [{token: Logprob(value) for token, value in enumerate(row.tolist())} for row in one.logprobs]
        output = CompletionOutput(0, "", one.token_ids, steps, "length")
        _compare_one(output, other, tolerance, f"prompt {at}")


def default_prompts(vocab_size: int = VOCAB) -> list[list[int]]:
    """Return prompts of 1 to 23 tokens; two of them begin with the same 11."""
    import random

    draw = random.Random(0)
    drawn = [[draw.randrange(3, vocab_size) for _ in range(length)] for length in (1, 5, 23, 16)]
    return [*drawn, drawn[2][:11] + drawn[1]]


def transformers_answers(
    folder: str | Path,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    trust_remote_code: bool = False,
    use_cache: bool = True,
) -> list[Answer]:
    """Return what transformers' own `generate` answers to each prompt alone: greedy, float32, on the CPU.

    Raises NoReference where `generate` itself fails.
    """
    return answers_of(_reference(folder, trust_remote_code), prompts, max_tokens, use_cache)


def answers_of(module: Any, prompts: Sequence[Sequence[int]], max_tokens: int, use_cache: bool = True) -> list[Answer]:
    """Return what `generate` of a transformers module answers to each prompt alone, greedily.

    Raises NoReference where `generate` itself fails.
    """
    import torch

    limits = {
        "max_new_tokens": max_tokens,
        "use_cache": use_cache,
        "do_sample": False,
        "num_beams": 1,
        "pad_token_id": 0,
    }
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        # A fresh copy a prompt, over the same weights: some modules carry state from one text into the next.
        alone = copy.deepcopy(module, {id(weight): weight for weight in module.parameters()})
        given = {"attention_mask": torch.ones_like(ids), "output_logits": True, "return_dict_in_generate": True}
        try:
            out = alone.generate(ids, **given, **limits)
        except Exception as error:  # anybody's module
            raise NoReference(f"transformers' own generate fails: {type(error).__name__}: {error}") from error
        logprobs = torch.stack(out.logits, 1)[0].float().log_softmax(-1)
        answers.append(Answer(out.sequences[0, len(prompt) :].tolist(), logprobs))
    return answers


def _reference(folder: str | Path, trust_remote_code: bool) -> Any:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    remote: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    config = transformers.AutoConfig.from_pretrained(str(folder), **remote)
    # Auto does not know the text parts of some composite models; the checkpoint names their class.
    named = getattr(transformers, (config.architectures or [""])[0], None)
    load = transformers.AutoModelForCausalLM if named is None or trust_remote_code else named
    return load.from_pretrained(str(folder), dtype=torch.float32, **remote).eval()


def _compare(llm: LLM, prompts: list[list[int]], wanted: Sequence[Answer], tolerance: float, cache: str) -> None:
    from core.sampling_params import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max(len(answer.token_ids) for answer in wanted), logprobs=0)
    for number, output in enumerate(llm.generate(prompts, params)):
        where = f"{llm.model_impl_name}, prompt {number} of {len(prompts[number])} tokens, {cache}"
        _compare_one(output.outputs[0], wanted[number], tolerance, where)


def _compare_one(found: CompletionOutput, wanted: Answer, tolerance: float, where: str) -> None:
    for at, token in enumerate(wanted.token_ids):
        got = found.token_ids[at] if at < len(found.token_ids) else None
        if got != token:
            margin = float(wanted.logprobs[at, token] - wanted.logprobs[at, got]) if got is not None else float("inf")
            assert margin < tolerance, (
                f"{where}: token {at} is {got}, transformers says {token}, which it prefers by {margin:.3g}. "
                f"Answer: {found.token_ids}, transformers': {wanted.token_ids}"
            )
            return
        assert found.logprobs is not None
        difference = abs(found.logprobs[at][token].logprob - float(wanted.logprobs[at, token]))
        assert difference < tolerance, f"{where}: the logprob of token {at} ({token}) differs by {difference:.3g}"
    assert found.token_ids == wanted.token_ids, f"{where}: {found.token_ids} goes on after {wanted.token_ids}"
