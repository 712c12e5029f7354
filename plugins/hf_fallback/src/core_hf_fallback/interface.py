"""The bridge from transformers' attention interface to the host's attention.

A model's attention modules call the function registered as "core". Which request batch they work for, they learn from
the Binding that was hung onto every module at load: no global state, so two models can live in one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from core.attention.interface import softmax_attention, visible
from core.batch import Batch
from core.contracts import AttentionArgs, KVSpec
from core.errors import UnsupportedAttention
from core.reach import Reach
from core_hf_fallback.alike import Alike
from core_hf_fallback.masks import Mask, MaskFunction, read_mask
from core_hf_fallback.taint import CountedTokens

NAME = "core"
ATTRIBUTE = "core_binding"
BOOKKEEPING = frozenset(
    {  # arguments that say nothing about this call's mathematics
        "position_ids",
        "cache_position",
        "past_key_values",
        "past_key_value",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "position_embeddings",
        "num_items_in_batch",
        "labels",
        "layer_idx",
        "logits_to_keep",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "deterministic",
    }
)


@dataclass(frozen=True)
class KnownCall:
    """A call that was checked while serving: the next one of its layer that says the same needs no second look."""

    facts: tuple[Any, ...]
    mask: Any
    sinks: Tensor | None
    args: AttentionArgs
    names: frozenset[str]  # of all further arguments
    unset: tuple[str, ...]  # those of them that are no bookkeeping: they have to stay without a value

    def same(self, facts: tuple[Any, ...], mask: Any, sinks: Tensor | None, others: dict[str, Any]) -> bool:
        return (
            mask is self.mask
            and sinks is self.sinks
            and facts == self.facts
            and others.keys() == self.names
            and (not self.unset or all(others[name] is None or others[name] is False for name in self.unset))
        )


@dataclass(frozen=True)
class Call:
    """One attention call of the forward that finds the layers, to be repeated on a real backend."""

    q: Tensor  # [tokens, heads, k_dim]
    k: Tensor  # [tokens, kv_heads, k_dim]
    v: Tensor  # [tokens, kv_heads, v_dim]
    args: AttentionArgs
    out: Tensor  # [tokens, heads, v_dim]


class Binding:
    """What one model's attention modules share: the names of layers, the current batch, and the calls so far."""

    def __init__(self, names: dict[int, str], model_name: str) -> None:
        self.names = names  # id(module) -> its path in the model
        self.model_name = model_name  # its class, for messages
        self.layers: dict[tuple[str, int], int] = {}  # (module path, occurrence in a forward) -> layer of the cache
        self.specs: list[KVSpec] = []
        self.masks: list[Mask] = []  # by order of creation in a forward
        self.recording = False
        self.counted: CountedTokens | None = None  # set for the recording forward
        self.problems: list[str] = []  # what the recording forward met; serving raises instead
        self.counting_layers: list[str] = []  # layers whose Q, K or V come from a count of the batch's tokens
        self.batch: Batch | None = None
        self.known: dict[int, KnownCall] = {}  # by id(module)
        self.recorded: list[Call] = []  # by layer
        self._calls: dict[str, int] = {}
        self._mask_calls = 0

    def start(self, batch: Batch | None) -> None:
        """Begin a forward over `batch`; None = a recording one, over the beginning of one text."""
        self.batch, self.recording = batch, batch is None
        self._calls.clear()
        self._mask_calls = 0
        if self.recording:
            self.known.clear()
            self.layers.clear()
            self.specs.clear()
            self.recorded.clear()
            self.masks.clear()

    def carry_over(self, alike: Alike) -> None:
        """Add the layers that were let through in the recording forward, like those that ran."""
        for (name, occurrence), layer in list(self.layers.items()):
            for path in alike.translated(name):
                self.layers[path, occurrence] = len(self.specs)
                self.specs.append(replace(self.specs[layer], name=path))
                self.recorded.append(self.recorded[layer])

    @contextmanager
    def noting_problems(self) -> Iterator[None]:
        """While recording, go on after a refusal, so that one forward finds all there is to know of a model."""
        try:
            yield
        except UnsupportedAttention as error:
            if not self.recording:
                raise
            self.problems.append(str(error))

    def name_of(self, module: nn.Module) -> str:
        return self.names.get(id(module), type(module).__name__)

    def label(self, module: nn.Module) -> str:
        """Name layer and model, for messages."""
        return f"Layer {self.name_of(module)} of {self.model_name}"

    def next_mask(self, function: MaskFunction) -> Mask:
        """Return the meaning of the next mask that the model asks for; read once, in the recording forward."""
        if self.recording:
            self.masks.append(read_mask(function))
        if self._mask_calls >= len(self.masks):
            raise UnsupportedAttention(f"{self.model_name} makes more masks in this forward than when it was loaded.")
        self._mask_calls += 1
        return self.masks[self._mask_calls - 1]

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> Tensor:
        """q, k, v [tokens, heads, dim] -> [tokens, heads, v_dim]."""
        return self.attend_as(self.name_of(module), module, q, k, v, args)

    def attend_as(self, name: str, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> Tensor:
        """`attend` for a module of a known name."""
        occurrence = self._calls.get(name, 0)
        self._calls[name] = occurrence + 1
        if self.recording:
            return self._record(module, occurrence, q, k, v, args)
        layer = self.layers.get((name, occurrence))
        if layer is None or self.batch is None:
            raise UnsupportedAttention(
                f"{self.label(module)} attends for the {occurrence + 1}. time in a forward; at load it did not."
            )
        return self.batch.attention.attend(q, k, v, layer, args)

    def _record(
        self, module: nn.Module, occurrence: int, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs
    ) -> Tensor:
        name, label = self.name_of(module), self.label(module)
        if q.shape[0] != k.shape[0]:
            self.problems.append(
                f"{label} attends with {q.shape[0]} queries over {k.shape[0]} keys: it keeps state of its own."
            )
            k, v = k[-q.shape[0] :], v[-q.shape[0] :]
        with self.noting_problems():
            _refuse_heads(label, q, k, v, args)
        if self.problems:
            return q.new_zeros(*q.shape[:2], v.shape[2])  # any answer will do to see the layers after it
        self.layers[name, occurrence] = len(self.specs)
        reach = Reach(args.window, args.chunk)
        self.specs.append(KVSpec(name, k.shape[1], k.shape[2], v.shape[2], k.dtype, str(k.device), reach))
        positions = torch.arange(len(q), device=q.device)
        distance = positions[:, None] - positions[None, :]
        mask = visible(positions[:, None], positions[None, :], args)
        grouped = q.view(len(q), k.shape[1], -1, q.shape[-1]).permute(1, 2, 0, 3)
        out = softmax_attention(grouped[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], mask, distance, args)
        result = out[0].permute(2, 0, 1, 3).reshape(len(q), q.shape[1], -1)
        self.recorded.append(Call(q, k, v, args, result))
        return result


def bind(model: nn.Module) -> Binding:
    """Hang one Binding onto every module of a model."""
    binding = Binding({id(module): name for name, module in model.named_modules()}, type(model).__name__)
    for module in model.modules():
        setattr(module, ATTRIBUTE, binding)
    for config in configs_of(model):
        setattr(config, ATTRIBUTE, binding)
    return binding


def bindings_of(model: nn.Module) -> list[Binding]:
    """Return what `bind` hung onto the modules, if it was called."""
    found = {id(one): one for module in model.modules() if (one := getattr(module, ATTRIBUTE, None)) is not None}
    return list(found.values())


def configs_of(model: nn.Module) -> Sequence[Any]:
    """Return every config object that a module of this model looks at."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for config in (getattr(module, "config", None),):
            if hasattr(config, "_attn_implementation"):
                found[id(config)] = config
    return list(found.values())


def use_attention(model: nn.Module, name: str) -> None:
    """Make a model's modules look up `name` in transformers' attention interface."""
    for config in configs_of(model):
        config._attn_implementation = name


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Registered as transformers' attention function "core".

    query [1, heads, tokens, k_dim], key and value [1, kv_heads, tokens, dim] -> [1, tokens, heads, v_dim].
    Raises UnsupportedAttention, naming layer and argument, for whatever it would otherwise drop.
    """
    binding: Binding = getattr(module, ATTRIBUTE)
    facts = (scaling, dropout, sliding_window, softcap, is_causal, query.shape[0])
    known = binding.known.get(id(module))
    if known is not None and known.same(facts, attention_mask, s_aux, others):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return binding.attend(module, q, k, v, known.args).contiguous().unsqueeze(0), None
    name = binding.name_of(module)
    if binding.counted is not None and binding.counted.reaches(query, key, value):
        binding.counting_layers.append(name)
    label = binding.label(module)
    with binding.noting_problems():
        _refuse_unknown(label, others, dropout)
        _refuse_batch(label, query)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    args = AttentionArgs(
        scaling=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        causal=causal or isinstance(attention_mask, Mask),
        softcap=softcap,
        sinks=s_aux,
    )
    with binding.noting_problems():
        args = _with_mask(label, args, attention_mask, sliding_window)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    with binding.counted.paused() if binding.counted is not None else nullcontext():
        out = binding.attend(module, q, k, v, args)
    if not binding.recording:
        binding.known[id(module)] = KnownCall(
            facts, attention_mask, s_aux, args, frozenset(others), tuple(others.keys() - BOOKKEEPING)
        )
    return out.contiguous().unsqueeze(0), None  # some modules view() it


def _refuse_batch(layer: str, query: Tensor) -> None:
    if query.shape[0] != 1:
        raise UnsupportedAttention(
            f"{layer} attends with a batch of {query.shape[0]}, not with the flat row given to it."
        )


def _refuse_heads(layer: str, q: Tensor, k: Tensor, v: Tensor, args: AttentionArgs) -> None:
    """Refuse q [tokens, heads, k_dim], k and v [tokens, kv_heads, dim] that are not grouped heads of one width."""
    if k.shape[1] != v.shape[1]:
        raise UnsupportedAttention(f"{layer} has {k.shape[1]} heads of K and {v.shape[1]} of V; they must agree.")
    if q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise UnsupportedAttention(
            f"{layer} attends with {q.shape[1]} query heads of width {q.shape[2]} over {k.shape[1]} K heads of width "
            f"{k.shape[2]}; the widths must agree and the heads divide."
        )
    if args.sinks is not None and args.sinks.shape != q.shape[1:2]:
        raise UnsupportedAttention(
            f"{layer} passes 's_aux' of shape {list(args.sinks.shape)} for {q.shape[1]} heads; it must be one a head."
        )


def _refuse_unknown(layer: str, others: dict[str, Any], dropout: float) -> None:
    for name, value in others.items():
        if value is not None and value is not False and name not in BOOKKEEPING:
            raise UnsupportedAttention(f"{layer} passes {name!r} to attention, which is not supported.")
    if dropout:
        raise UnsupportedAttention(f"{layer} asks for dropout {dropout}; serving has none.")


def _with_mask(layer: str, args: AttentionArgs, mask: Any, sliding_window: int | None) -> AttentionArgs:
    """The mask is what counts: plain attention functions ignore the `sliding_window` argument beside it."""
    if mask is None:
        return replace(args, window=sliding_window)
    if not isinstance(mask, Mask):
        raise UnsupportedAttention(f"{layer} brings a mask of its own ({type(mask).__name__}).")
    if mask.unknown:
        raise UnsupportedAttention(f"{layer}: {mask.unknown}.")
    return replace(args, window=mask.window, chunk=mask.chunk)


def mask_interface(mask_function: MaskFunction, config: Any = None, **_: Any) -> Mask:
    """Registered as transformers' mask builder "core": gives the mask's meaning instead of a tensor."""
    binding: Binding | None = getattr(config, ATTRIBUTE, None)
    if binding is None:
        raise UnsupportedAttention("The model makes a mask with a config that none of its modules holds.")
    return binding.next_mask(mask_function)


def register() -> None:
    """Enter both functions in transformers' tables; again does nothing."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask_interface)
