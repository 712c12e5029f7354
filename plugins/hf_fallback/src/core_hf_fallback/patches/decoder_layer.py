"""decoder-layer: x + attention(norm(x)), then + mlp(norm(that)), where each addition joins the norm that follows it.

A layer is known by its four children that do something, and by what they were given and what came out in the recording
forward; what it hands its attention besides, it goes on handing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from core.kernel_contracts import Kernels
from core_hf_fallback.patches.calls import BlockCall, LinearCalls
from core_hf_fallback.patches.operations import Norm
from core_hf_fallback.patches.shapes import is_hooked, replace_forwards, same


def fuse_layers(module: nn.Module, calls: LinearCalls, _: Kernels | None) -> list[Callable[[], None]]:
    """Replace the forward of every such layer; return how to undo each."""
    return replace_forwards(module, calls, lambda layer, path, _: recognise(layer, path, calls))


@torch.inference_mode()
def recognise(layer: nn.Module, path: str, calls: LinearCalls) -> Callable[..., Any] | None:
    """Return the quicker form of a layer that did in the recording forward what the formula does; else None."""
    children = dict(layer.named_children())
    norms = [vars(child).get("forward") for child in children.values()]
    norms = [norm for norm in norms if isinstance(norm, Norm)]
    blocks = [name for name in children if len(calls.blocks.get(f"{path}.{name}", [])) == 1]
    if len(norms) != 2 or len(blocks) != 2 or len(children) != 4 or layer._parameters or is_hooked(layer):
        return None
    (call,) = calls.blocks[path]
    x = call.args[0] if call.args else None
    if not isinstance(x, Tensor) or any(norm.dtype != x.dtype for norm in norms) or len(call.args) != 1:
        return None
    (attention,), (mlp,) = (calls.blocks[f"{path}.{name}"] for name in blocks)
    if not call.of_another and not _did_so(x, call.output, norms, attention, mlp):
        return None
    added = _added(call, attention)
    if added is None:
        return None
    return FusedLayer(norms, children[blocks[0]], children[blocks[1]], call.kwargs.keys(), added, layer.forward)


def _did_so(x: Tensor, out: Any, norms: list[Norm], attention: BlockCall, mlp: BlockCall) -> bool:
    """Follow the recorded tensors through the layer."""
    attended = attention.output[0] if isinstance(attention.output, tuple) else None
    into, fed = attention.kwargs.get("hidden_states"), mlp.output
    if attention.args or mlp.kwargs or len(mlp.args) != 1:
        return False
    if not isinstance(attended, Tensor) or not isinstance(fed, Tensor):
        return False
    between = x + attended
    return same(norms[0](x), into) and same(norms[1](between), mlp.args[0]) and same(between + fed, out)


def _added(layer: BlockCall, attention: BlockCall) -> dict[str, Any] | None:
    """What attention is given beside all that the layer is given; None if it is not all, or is more than a default."""
    passed = {name: value for name, value in attention.kwargs.items() if name != "hidden_states"}
    if any(passed.pop(name, layer) is not value for name, value in layer.kwargs.items()):
        return None
    return passed if all(value is None or value is False for value in passed.values()) else None


class FusedLayer:
    """The quicker form of one layer."""

    def __init__(
        self,
        norms: list[Norm],
        attention: nn.Module,
        mlp: nn.Module,
        usual: Collection[str],
        added: dict[str, Any],
        plain: Callable[..., Any],
    ) -> None:
        self.before, self.after = norms
        self.attention, self.mlp = attention, mlp
        self.usual, self.added, self.plain = usual, added, plain
        self._attend, self._feed = attention.forward, mlp.forward

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs.keys() != self.usual or hidden_states.dtype is not self.before.dtype:
            answer: Tensor = self.plain(hidden_states, *args, **kwargs)
            return answer
        attended = self._attend(hidden_states=self.before(hidden_states), **kwargs, **self.added)[0]
        normed, between = self.after.add(attended, hidden_states)
        out: Tensor = between + self._feed(normed)
        return out
