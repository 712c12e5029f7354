"""What hooks take and return. Protocols are what plugins give, dataclasses what the host gives. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

from core.reach import EVERYTHING, Reach

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from core.batch import Batch
    from core.quantize.layer import DecoderLayer
    from core.spec import ModelSpec

T = TypeVar("T")


@dataclass(frozen=True)
class Refusal:
    """Mine, but not this one. The reason is shown to the user by `core-serve explain`."""

    reason: str


@dataclass(frozen=True)
class Bid(Generic[T]):
    """Mine, and I can. `build` is called only for the winner."""

    name: str  # unique among the bids of one hook; what --model-impl or --attention-backend accepts
    priority: int  # usual: native 100, transformers/paged 30, /rows 20, /cache 10
    build: Callable[..., T | Refusal]  # a Refusal lets the next bid try (a probe found this one wrong)
    features: Mapping[str, Any] = field(default_factory=dict)  # shown by `explain`
    is_fallback: bool = False  # True: never chosen by --model-impl native
    family: str = ""  # --model-impl FAMILY means the highest bid of that family ("transformers")


# ---------------------------------------------------------------------------------------------- checkpoints


@runtime_checkable
class Checkpoint(Protocol):
    """An opened checkpoint. Nothing is read into memory until it is asked for."""

    spec: ModelSpec

    def tensor_names(self) -> Sequence[str]:
        """Return the names of all tensors, under transformers' naming."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every (name, tensor) once, in the dtype of the file, one in memory at a time."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, in the dtype of the file. Raises CheckpointError for a name that there is not."""
        ...


class Tokenizer(Protocol):
    """Text to ids and back."""

    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    vocab_size: int  # ids are in [0, vocab_size)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def id_to_token(self, token_id: int) -> str | None:
        """Return the vocabulary's own spelling of a token, None if there is no such id."""
        ...

    @property
    def has_chat_template(self) -> bool: ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> str:
        """Return the prompt text of a conversation. Raises InvalidParameter("messages") if the template refuses."""
        ...


# ---------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class KVSpec:
    """The K/V that one attention layer keeps for a token."""

    name: str  # the layer's module path, for messages
    num_kv_heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    device: str = "cpu"
    reach: Reach = EVERYTHING  # bounded: what lies further back is given back, and every call has to say the same


@dataclass(frozen=True)
class AttentionArgs:
    """What one attention call asks for; closed. A backend that does not honour a non-default value refuses."""

    scaling: float  # multiplies q @ k.T
    causal: bool = True
    window: int | None = None  # a token sees itself and window - 1 tokens before it
    chunk: int | None = None  # a token sees its own chunk of positions [n * chunk, (n + 1) * chunk) only
    softcap: float | None = None  # scores = softcap * tanh(scores / softcap), before masking
    sinks: Tensor | None = None  # [heads] logits that join the softmax without a value
    # Added to the scores, by distance = query position - key position. ALiBi slopes [heads]: -slope * distance;
    # or a table [heads, distances]: table[head, min(distance, distances - 1)], as T5's buckets are spread out.
    bias: Tensor | None = None

    def non_default(self) -> frozenset[str]:
        """Return the names of the arguments that a backend has to honour; a table is a "bias_table"."""
        asked = {name for name in ("window", "chunk", "softcap", "sinks") if getattr(self, name) is not None}
        if self.bias is not None:
            asked.add("bias" if self.bias.dim() == 1 else "bias_table")
        return frozenset(asked if self.causal else asked | {"not_causal"})


class AttentionBackend(Protocol):
    """Owns the layout of the K/V cache and the attention over it."""

    name: str
    honours: frozenset[str]  # of AttentionArgs.non_default()

    def allocate(self, specs: Sequence[KVSpec], num_blocks: Sequence[int], block_size: int) -> None:
        """Make the cache: one spec and one number of blocks a layer. Called once."""
        ...

    def plan(self, batch: Batch) -> None:
        """Prepare what all layers of this step share. Called once a step, before the model runs."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, args: AttentionArgs) -> Tensor:
        """Store k, v of this step's tokens in `layer`'s cache and attend over each request's whole context.

        Where the tokens go and where the context lies say `batch.places(reach)` of the layer's spec.

        q [tokens, heads, k_dim], k [tokens, kv_heads, k_dim], v [tokens, kv_heads, v_dim] -> [tokens, heads, v_dim].
        Raises UnsupportedAttention, naming layer and argument.
        """
        ...


@runtime_checkable
class StagedAttention(AttentionBackend, Protocol):
    """A backend whose plan is tensors that travel with a step's other inputs; its decode steps can be captured."""

    def stage(self, query_starts: Sequence[int], context_lens: Sequence[int]) -> Sequence[Tensor]:
        """Return what a step's plan needs, on the host; for decode steps of as many requests, of the same shapes."""
        ...

    def plan_staged(self, batch: Batch, staged: Sequence[Tensor]) -> None:
        """Do what `plan` does with `stage`'s tensors, on the device; copies nothing.

        In a captured step `batch.context_lens` are upper bounds: what they are lies in the tensors alone.
        """
        ...


# ---------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class ModelFeatures:
    """What the scheduler may do with a model."""

    chunked_prefill: bool = True  # False: a prompt is run whole, in one step
    prefix_caching: bool = True  # False: there is state that blocks do not hold, or K depends on the text's length
    patches: tuple[str, ...] = ()  # what was changed in somebody else's module to make it faster; shown to the user
    captures_decode: bool = False  # True: of a decode step it reads tensors alone, so a graph of one serves the next
    captures_on_trial: bool = False  # True: that is likely, not known; each graph is compared with a plain step once
    restart_after: int | None = None  # a text that grows past so many tokens is computed anew from its first token


class Model(Protocol):
    """A model that serves. Weights are loaded when it is built."""

    impl_name: str  # e.g. "native_llama", "transformers/paged"
    vocab_size: int  # width of the logits
    features: ModelFeatures

    def kv_specs(self) -> Sequence[KVSpec]:
        """Return what each attention layer keeps, in layer order; empty if the host keeps no K/V for this model."""
        ...

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits [len(batch.logit_rows), vocab] of the tokens that batch.logit_rows names."""
        ...

    def release(self, request_id: str) -> None:
        """Forget all state of a request that finished, was aborted or preempted. Unknown ids are fine."""
        ...


class QuantMethod(Protocol):
    """Owns a weight format from file to kernel, for native models and fallback alike.

    A checkpoint in its format is read with `tensors`; a float checkpoint is made small while it is loaded with
    `quantize`. A method serves one of the two purposes or both; the host knows which from `on_the_fly`. One that has a
    true attribute `by_transformers` does neither: transformers' own quantizer builds the layers.
    """

    name: str  # what --quantization and quantization_config call it, e.g. "awq"
    on_the_fly: bool  # True: the checkpoint holds floats, and `quantize` makes them small

    def tensors(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield every (name, tensor) under the names that a float checkpoint would have, one in memory at a time.

        A quantized weight is one `core.layers.QuantizedTensor` of `dtype` under its weight's name ("...q_proj.weight");
        tensors of the format itself (scales, zeros) are not yielded by themselves. On the fly: the file's tensors.
        Raises CheckpointError naming file and tensor for whatever is missing, misshapen or unknown.
        """
        ...

    def quantize(self, name: str, weight: Tensor) -> Tensor:
        """Return a linear's weight [..., out, in] quantized, or the weight itself where it has to stay in floats.

        Called on the fly only, once for each weight that a linear (or a stack of experts) multiplies with; not for
        embeddings and heads.
        """
        ...


@dataclass(frozen=True)
class QuantizeSettings:
    """What `core-serve quantize` was asked for; None = the method's choice. A method refuses what it has no use for."""

    group_size: int | None = None  # weights of a row that share a scale; -1 = a whole row
    symmetric: bool | None = None  # no zero points
    desc_act: bool | None = None  # columns in the order of their importance


class Quantizer(Protocol):
    """Makes checkpoints in a format. `core-serve quantize` drives it through a model, one decoder layer at a time."""

    name: str  # what --method calls it
    calibrates: bool  # True: it needs to see what the layers see when a text runs through them
    # Where it calibrates. True: layers see what the float model's layers put out, as a method needs that weighs inputs
    # by their size; False: what the quantized layers put out, as a method needs that makes errors good.
    sees_floats: bool
    group_sizes: tuple[int, ...]  # that it knows, the usual ones; one that divides all widths is chosen. (): no groups

    def quantize_layer(self, layer: DecoderLayer) -> Mapping[str, Mapping[str, Tensor]]:
        """Return {linear: {suffix: tensor}}, e.g. {"mlp.up_proj": {"qweight": ..., "scales": ...}}, for one layer.

        The checkpoint holds these tensors in place of the linear's `weight`; a linear that is left out stays in floats.
        The layer's other parameters may be changed (a scale that is folded into a norm) and are saved as they are left.
        """
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the float32 weight [out, in] that one linear's tensors stand for; later layers are run with it."""
        ...

    def config(self, in_floats: Sequence[str]) -> Mapping[str, Any]:
        """Return `quantization_config` for config.json; `in_floats` names the linears that are not quantized."""
        ...


# ---------------------------------------------------------------------------------------------- observers


@dataclass(frozen=True)
class StepStats:
    """One engine step, for `on_step`."""

    num_running: int
    num_waiting: int
    num_tokens: int  # tokens that ran
    num_prefill_tokens: int
    num_sampled: int  # tokens that requests got
    num_preempted: int
    free_blocks: int
    num_blocks: int
    seconds: float
    num_drafted: int = 0  # draft tokens that ran beside decodes; part of num_tokens
    num_accepted: int = 0  # of them, those that were the model's own tokens; part of num_sampled


@dataclass(frozen=True)
class RequestRecord:
    """One finished sample, for `on_request_finished`. Times in seconds."""

    id: str
    finish_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_preemptions: int
    queue_s: float  # from arrival to the first step
    ttft_s: float | None  # from arrival to the first token
    total_s: float
