"""The kit that plugin authors test with: tiny checkpoints, a comparison with transformers, a model without weights.

    def test_my_family_answers_like_transformers():
        assert_matches_transformers("llama", model_impl="my_models")

torch and transformers are imported where they are used.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.contracts import Bid, Checkpoint, KVSpec, ModelFeatures
from core.errors import ConfigError
from core.hookspecs import hookimpl
from core.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from core.batch import Batch
    from core.config import EngineConfig
    from core.llm import LLM
    from core.model_loader import BuildContext
    from core.outputs import CompletionOutput

VOCAB = 96
MAX_WEIGHTS = 20_000_000
TINY: dict[str, Any] = {  # what configs call their sizes -> a size that runs in milliseconds
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "max_seq_len": 256,
    "seq_length": 256,
    "context_length": 256,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "attention_hidden_size": 32,
    "lru_width": 32,
    "dim_model_base": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "n_inner": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "kv_channels": 8,
    "attention_head_dim": 16,
    "rotary_dim": 4,
    "sliding_window": 8,
    "attention_window_size": 8,
    "attention_chunk_size": 8,
    "window_size": 8,
    "local_attention": 8,
    "query_pre_attn_scalar": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "state_size": 4,
    "ssm_state_size": 4,
    "time_step_rank": 4,
    "mamba_d_state": 4,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
}
SPECIAL_TOKENS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": None}  # no token ends a text
OWN_WAYS: dict[str, dict[str, Any]] = {  # sizes that no table of names can say
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8},
    "modernbert-decoder": {"pad_token_id": 0},
    "zaya": {"num_experts_per_tok": 1},
}


# ------------------------------------------------------------------------------------------------ checkpoints


def tiny_checkpoint(model_type: str, folder: str | Path, **overrides: Any) -> Path:
    """Save a small random model of one of transformers' causal architectures, as a Hugging Face folder.

    Its default config is shrunk by the table TINY; `overrides` are entries of config.json that win over it, for
    architectures whose sizes the table does not know. No tokenizer; no token ends a text. Every weight is random,
    biases, norms and sinks too, so that none can be dropped unnoticed. The same arguments give the same weights.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = Path(folder)
    config = tiny_config(model_type, **overrides)
    _check_size(model_type, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomize(model)
    model.generation_config.eos_token_id = None
    model.save_pretrained(str(folder))
    return folder


def _check_size(model_type: str, config: Any) -> None:
    """Refuse a model that stayed large, before it takes memory: mostly one with towers for images or sound."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_WEIGHTS:
        raise ConfigError(
            f"{model_type!r} has {size:,} weights even when shrunk; tiny is {MAX_WEIGHTS:,} at most. Shrink the rest "
            "by `overrides`, or take the model type of its text part."
        )


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """Return transformers' config of a model type, shrunk by TINY, then changed by `overrides`."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"transformers knows no model type {model_type!r}; give one, or the folder of a checkpoint.")
    config_class = CONFIG_MAPPING[model_type]
    # The class's own names, not to_dict()'s: some store a size under another name than they take it.
    known = {**config_class().to_dict(), **getattr(config_class, "attribute_map", {})}
    sizes = {name: value for name, value in TINY.items() if known.get(name) is not None}
    for name in ("head_dim", "num_key_value_heads"):  # None where they follow from the other sizes, or have to be said
        if name in known:
            sizes[name] = TINY[name]
    tokens = {name: value for name, value in SPECIAL_TOKENS.items() if name in known}
    return config_class(**{**sizes, **tokens, **OWN_WAYS.get(model_type, {}), **overrides})


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
        tight: dict[str, Any] = {"block_size": 4, "max_num_batched_tokens": 7, "dtype": "float32", "device": "cpu"}
        tight |= {"skip_tokenizer_init": True, "trust_remote_code": trust_remote_code, "model_impl": model_impl}
        with LLM(model=str(folder), **{**tight, **options}) as llm:
            for cache in ("a cold prefix cache", "a warm prefix cache"):
                _compare(llm, asked, wanted, tolerance, cache)
            return llm.model_impl_name


def default_prompts(vocab_size: int = VOCAB) -> list[list[int]]:
    """Return prompts of 1 to 23 tokens; two of them begin with the same 11."""
    import random

    draw = random.Random(0)
    drawn = [[draw.randrange(3, vocab_size) for _ in range(length)] for length in (1, 5, 23, 16)]
    return [*drawn, drawn[2][:11] + drawn[1]]


def transformers_answers(
    folder: str | Path, prompts: Sequence[Sequence[int]], max_tokens: int, trust_remote_code: bool = False
) -> list[Answer]:
    """Return what transformers' own `generate` answers to each prompt alone: greedy, float32, on the CPU."""
    import torch

    module = _reference(folder, trust_remote_code)
    limits = {"max_new_tokens": max_tokens, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
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
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(str(folder), dtype=torch.float32, **remote).eval()


def _compare(llm: LLM, prompts: list[list[int]], wanted: list[Answer], tolerance: float, cache: str) -> None:
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
