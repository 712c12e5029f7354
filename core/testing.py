"""The kit that plugin authors test with: tiny checkpoints, a comparison with transformers, a model without weights.

    def test_my_family_answers_like_transformers():
        assert_matches_transformers("llama", model_impl="my_models")

torch and transformers are imported where they are used.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.contracts import Bid, Checkpoint, KVSpec, ModelFeatures
from core.errors import CheckpointError, ConfigError
from core.hookspecs import hookimpl
from core.spec import ModelSpec
from core.testing_configs import VOCAB, model_class_of, tiny_config

if TYPE_CHECKING:
    from torch import Tensor

    from core.batch import Batch
    from core.config import EngineConfig
    from core.llm import LLM
    from core.model_loader import BuildContext
    from core.outputs import CompletionOutput


MAX_WEIGHTS = 20_000_000


# ------------------------------------------------------------------------------------------------ checkpoints


def tiny_checkpoint(model_type: str, folder: str | Path, **overrides: Any) -> Path:
    """Save a small random model of one of transformers' causal architectures, as a Hugging Face folder.

    `core.testing_configs` shrinks its default config; `overrides` are entries of config.json that win over that, for
    architectures whose sizes it does not know. No tokenizer; no token ends a text. Every weight is random,
    biases, norms and sinks too, so that none can be dropped unnoticed. The same arguments give the same weights.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = Path(folder)
    config = tiny_config(model_type, **overrides)
    model_class = model_class_of(model_type)
    _check_size(model_type, model_class, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class._from_config(config, dtype=torch.float32)
        _randomize(model)
    model.generation_config.eos_token_id = None
    model.save_pretrained(str(folder))
    return folder


def packed_checkpoint(
    source: str | Path,
    folder: str | Path,
    quantization_config: Mapping[str, Any],
    pack: Callable[[str, Tensor], Mapping[str, Tensor] | None],
) -> Path:
    """Write a quantized copy of a Hugging Face folder, for tests of a quantization plugin.

    `pack(name, weight)` is asked for every tensor and gives what stands in its place by its last name
    ({"qweight": ..., "scales": ...} for "...q_proj.weight"), or None for a tensor that stays.
    """
    from safetensors.torch import save_file

    from core.weights import HFCheckpoint

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Tensor] = {}
    for name, tensor in HFCheckpoint(source).tensors():
        packed = pack(name, tensor)
        module = name.rpartition(".")[0]
        found |= {name: tensor} if packed is None else {f"{module}.{part}": value for part, value in packed.items()}
    save_file(found, str(folder / "model.safetensors"), metadata={"format": "pt"})
    for file in Path(source).glob("*.json"):
        config = json.loads(file.read_text())
        if file.name == "config.json":
            config["quantization_config"] = dict(quantization_config)
        (folder / file.name).write_text(json.dumps(config, indent=2))
    return folder


def _check_size(model_type: str, model_class: Any, config: Any) -> None:
    """Refuse a model that stayed large, before it takes memory: mostly one with towers for images or sound."""
    import torch

    with torch.device("meta"):
        size = sum(weight.numel() for weight in model_class._from_config(config).parameters())
    if size > MAX_WEIGHTS:
        raise ConfigError(
            f"{model_type!r} has {size:,} weights even when shrunk; tiny is {MAX_WEIGHTS:,} at most. Shrink the rest "
            "by `overrides`, or take the model type of its text part."
        )


def _randomize(model: Any) -> None:
    """Make outputs differ clearly between tokens: transformers' own initial weights give nearly flat logits."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.add_(torch.randn_like(parameter) * spread)
        for buffer in model.buffers():
            if buffer.is_floating_point() and not torch.isfinite(buffer).all():
                buffer.nan_to_num_(0.0)


# ------------------------------------------------------------------------------------------------ comparison


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
    tokens by less than `tolerance` (in nats, as logprobs are), a prompt's comparison ends. Raises AssertionError.
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
    """Return what transformers' own `generate` answers to each prompt alone: greedy, float32, on the CPU."""
    return answers_of(_reference(folder, trust_remote_code), prompts, max_tokens, use_cache)


def answers_of(module: Any, prompts: Sequence[Sequence[int]], max_tokens: int, use_cache: bool = True) -> list[Answer]:
    """Return what `generate` of a transformers module answers to each prompt alone, greedily."""
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
        out = alone.generate(
            ids, attention_mask=torch.ones_like(ids), output_logits=True, return_dict_in_generate=True, **limits
        )
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


# ------------------------------------------------------------------------------------------------ without weights


class EchoModel:
    """A `core.contracts.Model` without weights or K/V: after token t it is nearly sure of t + 1, wrapping around."""

    impl_name = "echo"
    features = ModelFeatures()

    def __init__(self, vocab_size: int = VOCAB) -> None:
        self.vocab_size = vocab_size
        self.released: list[str] = []  # ids, in order: what a test may ask for

    def kv_specs(self) -> Sequence[KVSpec]:
        return []

    def forward(self, batch: Batch) -> Tensor:
        """Logits [rows, vocab]: 20 for the next token, 0 for all others."""
        import torch

        following = (batch.token_ids[batch.logit_rows] + 1) % self.vocab_size
        return 20.0 * torch.nn.functional.one_hot(following, self.vocab_size).float()

    def release(self, request_id: str) -> None:
        self.released.append(request_id)


@dataclass
class EchoCheckpoint:
    """A `core.contracts.Checkpoint` without tensors."""

    spec: ModelSpec

    def tensor_names(self) -> Sequence[str]:
        return []

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def tensor(self, name: str) -> Tensor:
        raise CheckpointError(f"The echo model has no tensor {name!r}.")


class EchoPlugin:
    """Serves EchoModel for the path "echo": `build_engine(config, PluginHost.load(extra={"echo": EchoPlugin()}))`."""

    CORE_API = (1, 0)

    def __init__(self, max_positions: int = 128) -> None:
        self.max_positions = max_positions

    @hookimpl
    def provide_checkpoint(self, path: str, options: EngineConfig) -> Checkpoint | None:
        if path != "echo":
            return None
        config = {"model_type": "echo", "vocab_size": VOCAB, "max_position_embeddings": self.max_positions}
        return EchoCheckpoint(ModelSpec(Path("echo"), "echo", config))

    @hookimpl
    def resolve_model_impl(self, spec: ModelSpec, options: EngineConfig) -> Bid[Any] | None:
        def build(checkpoint: Checkpoint, context: BuildContext) -> EchoModel:
            return EchoModel(VOCAB)

        return Bid("echo", 100, build) if spec.model_type == "echo" else None
