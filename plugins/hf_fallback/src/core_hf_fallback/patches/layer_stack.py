"""layer-stack: fused layers in a row run in one call of the kernels (`core.kernel_contracts.DecoderKernel`).

The first layer of a stack runs all of them; the others hand on what they are given. Which layers follow each other the
recording forward has seen: one's output is the next one's input, and all turn by the same angles. While serving, layers
that are called otherwise are an error; where somebody looks at one, all of a stack run one by one. Most models loop
over one list and give each layer the same: they are shown the first alone (stacked_list.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import CoreError
from core.kernel_contracts import Kernels, LayerParts
from core.layers import LayerStack, kernels_of
from core_hf_fallback.patches.attention_block import FusedAttention
from core_hf_fallback.patches.calls import BlockCall, LinearCalls
from core_hf_fallback.patches.decoder_layer import FusedLayer
from core_hf_fallback.patches.gated_mlp import FusedMLP
from core_hf_fallback.patches.operations import Norm
from core_hf_fallback.patches.stack_head import Ahead, StackHead, find_head
from core_hf_fallback.patches.stacked_list import show_first

ANGLES, MASK = "position_embeddings", "attention_mask"


def stack_layers(module: nn.Module, calls: LinearCalls, kernels: Kernels | None) -> list[Callable[[], None]]:
    """Replace the forward of every layer that stands in a stack; return how to undo each."""
    undo: list[Callable[[], None]] = []
    if kernels is None:
        return undo
    chains = _chains(module, calls)
    for layers in chains:
        head = find_head(module, layers) if layers is chains[-1] else None
        parts = [found for layer in layers if (found := parts_of(layer.forward)) is not None]  # all have some
        kernel = kernels.decoder(parts, None if head is None else head.parts)
        if kernel is not None:
            head = head if kernel.has_head else None
            after = () if head is None else (head.norm, head.head)
            shared = Shared(LayerStack(kernel, layers, after), head)
            undo += _replace(layers, shared)
            if head is not None:
                undo += head.replace()
            if _given_the_same(layers, module, calls):
                undo += show_first(module, layers, shared.runs_all)
    return undo


def _given_the_same(layers: Sequence[nn.Module], module: nn.Module, calls: LinearCalls) -> bool:
    """True if every layer was given what the first was, beside its input."""
    paths = {id(part): path for path, part in module.named_modules()}
    first, *others = (calls.blocks[paths[id(layer)]][0].kwargs for layer in layers)
    return all(one.keys() == first.keys() and all(one[name] is first[name] for name in first) for one in others)


def _replace(layers: Sequence[nn.Module], shared: Shared) -> list[Callable[[], None]]:
    vars(layers[0])["stack"] = shared.stack
    undo = [lambda: delattr(layers[0], "stack")]
    for index, layer in enumerate(layers):
        fused = layer.forward
        assert isinstance(fused, FusedLayer)
        kind = FirstLayer if index == 0 else LaterLayer
        shared.layers.append((layer, kind(shared, fused, is_last=index == len(layers) - 1)))
        layer.forward = shared.layers[-1][1]  # type: ignore[method-assign]
        undo.append(lambda layer=layer, fused=fused: setattr(layer, "forward", fused))  # type: ignore[misc]
    return undo


def _chains(module: nn.Module, calls: LinearCalls) -> list[list[nn.Module]]:
    """Return the layers that can run together, in the order of the recording forward."""
    chains: list[list[nn.Module]] = []
    before: BlockCall | None = None
    for path, found in calls.blocks.items():
        layer = module.get_submodule(path)
        if parts_of(layer.forward) is None:
            continue
        (call,) = found
        follows = before is not None and call.args[0] is before.output and _angles(call) is _angles(before)
        if not follows:
            chains.append([])
        chains[-1].append(layer)
        before = call
    return chains


def _angles(call: BlockCall) -> Any:
    return call.kwargs.get(ANGLES)


def parts_of(layer: Callable[..., Any]) -> LayerParts | None:
    """Return a fused layer by its kernels; None where one of its parts has none, or it is no fused layer."""
    if not isinstance(layer, FusedLayer):
        return None
    attention, mlp = layer.attention.forward, layer.mlp.forward
    if not isinstance(attention, FusedAttention) or not isinstance(mlp, FusedMLP) or mlp.gate_kernel is None:
        return None
    if attention.parts.rotate.interleaved or attention.rotated != attention.parts.dim:
        return None
    if ANGLES not in layer.usual or MASK not in layer.usual:
        return None
    by_head: tuple[Norm | None, Norm | None] = attention.parts.norms or (None, None)
    q_norm, k_norm = (None if norm is None else norm.kernel for norm in by_head)
    qkv, gate_up = (_all(parts) for parts in (attention.parts.linears, mlp.first))
    output, down = kernels_of(attention.parts.output_linear), kernels_of(mlp.down)
    before, between = layer.before.kernel, layer.after.kernel
    if not qkv or not gate_up or not output or not down or before is None or between is None:
        return None
    if attention.parts.norms is not None and (q_norm is None or k_norm is None):
        return None
    return LayerParts(
        attention_norm=before,
        qkv=qkv,
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.parts.dim,
        q_norm=q_norm,
        k_norm=k_norm,
        layer=attention.layer,
        args=attention.args,
        output=output[0],
        mlp_norm=between,
        gate_up=gate_up,
        gate=mlp.gate_kernel,
        down=down[0],
    )


def _all(linears: Sequence[nn.Module]) -> list[Callable[[Tensor], Tensor]]:
    """Return every linear's kernel; [] if one has none."""
    found = [kernels_of(linear) for linear in linears]
    return [kernel for kernels in found for kernel in kernels] if all(found) else []


class Shared:
    """What the layers of a stack know of a forward."""

    def __init__(self, stack: LayerStack, head: StackHead | None) -> None:
        self.stack, self.head = stack, head
        self.layers: list[tuple[nn.Module, StackedLayer]] = []
        self.out: Tensor | None = None  # of all layers, until the last one was called; None: they run one by one
        self.angles: Any = None
        self.is_alone = False  # the first layer is the only one that will be called

    def runs_all(self) -> bool:
        """True if the first layer is going to run all of them in this forward; then it need be the only one called."""
        attention = self.layers[0][1].attention
        batch = attention.binding.batch
        self.is_alone = (
            batch is not None
            and attention.dtype is torch.float32
            and all(vars(layer)["forward"] is forward for layer, forward in self.layers)
            and self.stack.takes(batch.attention)
        )
        return self.is_alone

    def run(self, hidden_states: Tensor, angles: Any, attention: FusedAttention) -> Tensor | None:
        """Return what all layers make of hidden_states [1, tokens, hidden]; None if they have to run one by one."""
        batch = attention.binding.batch
        if batch is None or hidden_states.shape[0] != 1:
            return None
        x = hidden_states[0].clone()  # the model may still want what it handed over
        cos, sin = (angle[0].contiguous() for angle in angles)
        logits = None if self.head is None else self.head.logits_for(x, len(batch.logit_rows))
        rows = batch.logit_rows if self.head is not None and self.head.was_used and logits is None else None
        if not self.stack.run(x, (cos, sin), batch.attention, logits, rows):
            return None
        self.angles, out = angles, x.unsqueeze(0)
        if self.head is not None:
            self.head.ahead = None if logits is None else Ahead(out, logits)
        return out


class StackedLayer:
    """The forward of one layer of a stack."""

    def __init__(self, shared: Shared, fused: FusedLayer, is_last: bool) -> None:
        self.shared, self.fused, self.is_last = shared, fused, is_last
        attention = fused.attention.forward
        assert isinstance(attention, FusedAttention)
        self.attention = attention

    def _is_usual(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """True if the call says what the recorded one said."""
        return (
            not args
            and kwargs.keys() == self.fused.usual
            and kwargs[MASK] is self.attention.mask
            and kwargs.get("past_key_values") is None
            and not self.attention.binding.recording
        )


class FirstLayer(StackedLayer):
    """Runs all layers of its stack."""

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shared = self.shared
        called = shared.layers if shared.is_alone else shared.layers[:1]
        shared.out, shared.is_alone = None, False
        if self._is_usual(args, kwargs):
            shared.out = shared.run(hidden_states, kwargs[ANGLES], self.attention)
        if shared.out is None:
            for _, layer in called:
                hidden_states = layer.fused(hidden_states, *args, **kwargs)
            return hidden_states
        out = shared.out
        if self.is_last:
            shared.out = None
        return out


class LaterLayer(StackedLayer):
    """Hands on what the first layer has computed."""

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shared = self.shared
        if shared.out is None:
            return self.fused(hidden_states, *args, **kwargs)
        same = hidden_states is shared.out and self._is_usual(args, kwargs) and kwargs[ANGLES] is shared.angles
        if not same:
            raise CoreError(
                f"{self.attention.binding.label(self.attention.block)} was called otherwise than when the model was "
                "loaded, after the layers before it had run together. Start with --disable-patch layer-stack."
            )
        if self.is_last:
            shared.out = None
        return hidden_states
