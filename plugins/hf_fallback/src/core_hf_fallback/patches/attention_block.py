"""attention-block: the projections, norms by head, rotation and output around an attention call, in few calls.

    q, k, v = projections(x);  q, k = norm(q), norm(k);  q, k = rotated(q), rotated(k);  output(attend(q, k, v))

A block is known by its children, three linears and an output, two norms or none, and by what it handed to attention and
answered in the recording forward. A call that is not like the recorded one goes through the block's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.kernel_contracts import Kernels
from core_hf_fallback.interface import ATTRIBUTE, BOOKKEEPING, Binding, Call
from core_hf_fallback.patches.calls import BlockCall, LinearCalls
from core_hf_fallback.patches.operations import Norm, Rotation, rotations
from core_hf_fallback.patches.shapes import is_hooked, linears_of, others_of, replace_forwards, same, together

GIVEN = frozenset({"hidden_states", "position_embeddings", "attention_mask", "past_key_values"})
Projections = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # x [1, tokens, in] -> q, k, v [1, tokens, heads * dim]


@dataclass(frozen=True)
class Parts:
    """What the block is made of."""

    linears: list[nn.Module]  # of Q, K and V: one for all, or three
    project: Projections
    norms: tuple[Norm, Norm] | None  # of Q and of K, by head
    rotate: Rotation
    output_linear: nn.Module
    output: Callable[[Tensor], Tensor]
    dim: int

    def heads(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [1, tokens, in] -> q, k, v [tokens, heads, dim], as attention is given them."""
        tokens, dim = x.shape[1], self.dim
        q, k, v = (part.view(tokens, -1, dim) for part in self.project(x))
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        cos, sin = (self.rotate.angles(angle.view(tokens, 1, -1)) for angle in angles)
        return self.rotate(q, cos, sin), self.rotate(k, cos, sin), v


def fuse_attention(module: nn.Module, calls: LinearCalls, kernels: Kernels | None) -> list[Callable[[], None]]:
    """Replace the forward of every such block; return how to undo each."""
    return replace_forwards(
        module, calls, lambda block, path, call: recognise(block, path, call, calls.choices, kernels)
    )


@torch.inference_mode()
def recognise(
    block: nn.Module, path: str, call: BlockCall, choices: dict[str, str], kernels: Kernels | None
) -> Callable[..., Any] | None:
    """Return the quicker form of a block that did in the recording forward what the formula does; else None.

    `choices` gets the way to rotate by the block's path; in a block that is like another it says which one.
    """
    recorded = _recorded(block)
    if recorded is None or is_hooked(block) or call.args or block._parameters:
        return None
    x, angles = call.kwargs.get("hidden_states"), call.kwargs.get("position_embeddings")
    if not _plain_call(call) or not isinstance(x, Tensor) or not _are_angles(angles, x):
        return None
    width = recorded.q.shape[-1]
    if any(angle.numel() != x.shape[1] * angle.shape[-1] or angle.shape[-1] > width for angle in angles):
        return None
    if not isinstance(call.output, tuple) or len(call.output) != 2 or call.output[1] is not None:
        return None
    for parts in _parts(block, recorded, kernels, x.dtype):
        if choices.get(path) == parts.rotate.form if call.of_another else _did_so(parts, recorded, call):
            choices[path] = parts.rotate.form
            return FusedAttention(block, parts, recorded, call)
    return None


def _did_so(parts: Parts, recorded: Call, call: BlockCall) -> bool:
    found = parts.heads(call.kwargs["hidden_states"], call.kwargs["position_embeddings"])
    wanted = (recorded.q, recorded.k, recorded.v)
    return all(map(same, found, wanted)) and same(parts.output(recorded.out.flatten(1)[None]), call.output[0])


class FusedAttention:
    """The quicker form of one block."""

    def __init__(self, block: nn.Module, parts: Parts, recorded: Call, call: BlockCall) -> None:
        self.block, self.parts, self.binding, self.plain = block, parts, _binding(block), block.forward
        self.further = call.kwargs.keys() - GIVEN
        self.name, self.args, self.mask = self.binding.name_of(block), recorded.args, call.kwargs.get("attention_mask")
        self.heads, self.kv_heads = recorded.q.shape[1], recorded.k.shape[1]
        self.dtype, self.rotated = recorded.q.dtype, int(call.kwargs["position_embeddings"][0].shape[-1])

    @property
    def layer(self) -> int:
        """Of the attention backend."""
        return self.binding.layers[self.name, 0]

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        binding = self.binding
        usual = attention_mask is self.mask and past_key_values is None and others.keys() == self.further
        if not usual or position_embeddings is None or hidden_states.dtype is not self.dtype or binding.recording:
            answer: tuple[Tensor, None] = self.plain(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **others,
            )
            return answer
        q, k, v = self.parts.heads(hidden_states, position_embeddings)
        out = binding.attend_as(self.name, self.block, q, k, v, self.args)
        return self.parts.output(out.reshape(1, len(out), -1)), None


def _binding(block: nn.Module) -> Binding:
    binding: Binding = getattr(block, ATTRIBUTE)
    return binding


def _recorded(block: nn.Module) -> Call | None:
    """Return the only attention call of a block, if there was one."""
    binding = getattr(block, ATTRIBUTE, None)
    if binding is None:
        return None
    name = binding.name_of(block)
    layer = binding.layers.get((name, 0))
    once = layer is not None and (name, 1) not in binding.layers and layer < len(binding.recorded)
    found: Call | None = binding.recorded[layer] if once else None
    return found


def _plain_call(call: BlockCall) -> bool:
    """True if nothing was said that could matter beside what a quicker form is given."""
    return call.kwargs.get("past_key_values") is None and call.kwargs.keys() <= GIVEN | BOOKKEEPING


def _are_angles(angles: Any, x: Tensor) -> bool:
    pair = isinstance(angles, (tuple, list)) and len(angles) == 2 and all(isinstance(angle, Tensor) for angle in angles)
    return pair and all(angle.dtype == x.dtype and angle.is_contiguous() for angle in angles)


def _parts(block: nn.Module, recorded: Call, kernels: Kernels | None, dtype: torch.dtype) -> Iterator[Parts]:
    """Yield what the block may be made of: each way to rotate."""
    linears = [part for _, part in linears_of(block)]
    norms = [vars(other).get("forward") for other in others_of(block) if list(other.parameters())]
    dim = recorded.q.shape[-1]
    by_head = [norm for norm in norms if isinstance(norm, Norm) and norm.size == dim]
    if len(linears) != 4 or len(norms) not in (0, 2) or len(by_head) != len(norms) or recorded.v.shape[-1] != dim:
        return
    if any(norm.dtype != dtype for norm in by_head):
        return
    sizes = [part.shape[1] * dim for part in (recorded.q, recorded.k, recorded.v)]
    if [part.out_features for part in linears[:3]] != sizes:
        return
    product = together(linears[:3])
    first = linears[:3] if product is None else [product]
    pair = (by_head[0], by_head[1]) if by_head else None
    for rotate in rotations(kernels, dtype):
        yield Parts(first, _projections(first, sizes), pair, rotate, linears[3], linears[3].forward, dim)


def _projections(linears: list[nn.Module], sizes: list[int]) -> Projections:
    if len(linears) == 1:
        product = linears[0].forward
        return lambda x: torch.split_with_sizes(product(x), sizes, -1)  # type: ignore[return-value]
    first, second, third = (part.forward for part in linears)
    return lambda x: (first(x), second(x), third(x))
