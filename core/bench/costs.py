"""What a model costs by its size: bytes that a step reads, multiplications and additions that a token takes.

Read off the weights as they lie in memory: a quantized weight counts the bytes it has. Embeddings are looked up, a few
rows at a time, so they count nothing; a head that shares their weight counts as the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from core.contracts import KVSpec, Model
from core.layers import QuantizedTensor
from core.verify_layers import modules_of

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # what configs call them


@dataclass(frozen=True)
class LayerKV:
    """One attention layer: what a token in its context costs."""

    bytes_per_token: int  # of K and V
    flops_per_pair: int  # of one query over one key
    most: int | None  # tokens that a token sees at the most

    def seen(self, context: float) -> float:
        return context if self.most is None else min(context, self.most)


@dataclass(frozen=True)
class ModelCosts:
    """All of one model."""

    parameters: int  # numbers in memory; a head that is packed for speed counts beside the embedding that it shares
    weight_bytes: int  # of all weights, embeddings too
    body_bytes: int  # that every step reads, the head left out
    head_bytes: int
    body_flops: int  # of one token, the head and attention left out
    head_flops: int  # of one row of logits
    expert_bytes: int  # of all experts of a mixture; a step reads those that its tokens go to
    expert_flops: int  # of one token through every expert; it takes its share of them
    expert_share: float  # of all experts, that one token goes to
    layers: tuple[LayerKV, ...]

    @property
    def flops_per_token(self) -> float:
        """Of a decoded token, attention left out."""
        return self.body_flops + self.head_flops + self.expert_flops * self.expert_share

    def step_bytes(self, tokens: int) -> float:
        """Weights that a step of so many tokens reads; of experts those expected for tokens that choose at random."""
        hit = 1 - (1 - self.expert_share) ** tokens
        return self.body_bytes + self.head_bytes + self.expert_bytes * hit

    def kv_bytes(self, context: float) -> float:
        """K and V that one decoded token reads."""
        return sum(layer.bytes_per_token * layer.seen(context) for layer in self.layers)

    def pair_flops(self, context: float) -> float:
        """Attention of one token over its context."""
        return sum(layer.flops_per_pair * layer.seen(context) for layer in self.layers)

    def prefill_flops(self, length: int) -> float:
        """A whole prompt: every token through the body, one row through the head, causal attention."""
        pairs = sum(layer.flops_per_pair * _causal_pairs(length, layer.most) for layer in self.layers)
        return (self.body_flops + self.expert_flops * self.expert_share) * length + self.head_flops + pairs


def _causal_pairs(length: int, most: int | None) -> float:
    full = length if most is None else min(length, most)
    return full * (full + 1) / 2 + (length - full) * full


@dataclass(frozen=True)
class _Weight:
    """One weight that a module multiplies with."""

    num_bytes: int
    matrix: int  # numbers in it, if it is a matrix or a stack of them; else 0
    is_stack: bool
    is_embedding: bool
    is_head: bool


def model_costs(model: Model, config: Mapping[str, Any]) -> ModelCosts:
    """Add up a served model; `config` is its config.json, for experts and heads of queries."""
    weights = list(_weights(model))
    used = [weight for weight in weights if not weight.is_embedding]
    stacks = [weight for weight in used if weight.is_stack]
    heads = [weight for weight in used if weight.is_head]
    body = [weight for weight in used if not weight.is_stack and not weight.is_head]
    return ModelCosts(
        parameters=_distinct_numbers(model),
        weight_bytes=_distinct_bytes(model),
        body_bytes=sum(weight.num_bytes for weight in body),
        head_bytes=sum(weight.num_bytes for weight in heads),
        body_flops=2 * sum(weight.matrix for weight in body),
        head_flops=2 * sum(weight.matrix for weight in heads),
        expert_bytes=sum(weight.num_bytes for weight in stacks),
        expert_flops=2 * sum(weight.matrix for weight in stacks),
        expert_share=_expert_share(config),
        layers=tuple(_layer_kv(spec, config) for spec in model.kv_specs()),
    )


def all_modules(model: Model) -> list[nn.Module]:
    """Return every module of a served model, each once."""
    return list({id(part): part for whole in modules_of(model) for part in whole.modules()}.values())


def _weights(model: Model) -> Iterator[_Weight]:
    """Every weight by the module that uses it: one that two modules share is read by both.

    The head is the matrix onto the vocabulary that stands in no list of layers.
    """
    layers = _in_lists(model)
    for module in all_modules(model):
        for tensor in [*module._parameters.values(), *_packed(module)]:
            if tensor is not None:
                matrix = tensor.numel() if tensor.dim() > 1 else 0
                embedding = "Embedding" in type(module).__name__ and matrix > 0
                onto_vocab = tensor.dim() == 2 and tensor.shape[0] == model.vocab_size
                head = onto_vocab and not embedding and id(module) not in layers
                yield _Weight(_bytes_of(tensor), matrix, tensor.dim() == 3, embedding, head)


def _in_lists(model: Model) -> set[int]:
    """Return the ids of all modules inside an nn.ModuleList."""
    lists = [module for module in all_modules(model) if isinstance(module, nn.ModuleList)]
    return {id(part) for layers in lists for part in layers.modules()}


def _packed(module: nn.Module) -> list[Tensor | None]:
    """Linears in an order of their own keep their weight as a buffer; other buffers (masks, say) are no weights."""
    return list(module._buffers.values()) if hasattr(module, "in_features") else []


def _bytes_of(tensor: Tensor) -> int:
    return tensor.num_bytes if isinstance(tensor, QuantizedTensor) else tensor.numel() * tensor.element_size()


def _distinct(model: Model) -> list[Tensor]:
    held = [tensor for module in all_modules(model) for tensor in [*module._parameters.values(), *_packed(module)]]
    return list({_memory(tensor): tensor for tensor in held if tensor is not None}.values())


def _memory(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """Where a weight lies: two that share their memory are one, whatever objects they are."""
    parts = tensor.parts.values() if isinstance(tensor, QuantizedTensor) else [tensor]
    return tuple((part.data_ptr(), part.numel()) for part in parts)


def _distinct_bytes(model: Model) -> int:
    return sum(_bytes_of(tensor) for tensor in _distinct(model))


def _distinct_numbers(model: Model) -> int:
    return sum(tensor.numel() for tensor in _distinct(model))


def _expert_share(config: Mapping[str, Any]) -> float:
    total = next((config[name] for name in EXPERTS if config.get(name)), None)
    chosen = config.get("num_experts_per_tok")
    return chosen / total if total and chosen else 1.0


def _layer_kv(spec: KVSpec, config: Mapping[str, Any]) -> LayerKV:
    width = spec.k_dim + spec.v_dim
    heads: Sequence[Any] = [config.get(name) for name in ("num_attention_heads", "n_head", "n_heads", "num_heads")]
    query_heads = next((count for count in heads if isinstance(count, int)), spec.num_kv_heads)
    most = spec.reach.most if spec.reach.is_bounded else None
    return LayerKV(spec.num_kv_heads * width * spec.dtype.itemsize, 2 * query_heads * width, most)
