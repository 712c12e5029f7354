"""Which parameters can take the inverse of a scale on a linear's input, found by trying, in any decoder layer.

x @ W.T = (x / s) @ (W * s).T, so what makes x has to give x / s: a norm by its weight, an earlier linear by its output
rows. No list of architectures says which: whatever ran before is tried, the nearest first, and taken if the layer, run
on calibration input with random scales folded in, puts out what it did before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.quantize.layer import DecoderLayer, InputGroup, LeafCall, unharmed

EXACT = 1e-4  # of the largest output: what float32 rounding moves at most, and a wrong fold by far exceeds


@dataclass(frozen=True)
class Absorber:
    """Divides what goes into a group of linears by a scale. `free` scales are spread to the group's inputs."""

    name: str
    module: nn.Module
    fold: Callable[[Tensor], None]  # [free] -> divides the module's parameters in place
    spread: Callable[[Tensor], Tensor]  # [free] -> [in]: inputs that come from one row have one scale
    gather: Callable[[Tensor], Tensor]  # [in] -> [free]: the mean over such inputs
    free: int


def find_absorber(layer: DecoderLayer, group: InputGroup) -> Absorber | None:
    """Return what can absorb a scale of the group's input, None if nothing can."""
    if group.position < 0:
        return None
    before = layer.calls[0].run(layer.module)
    for candidate in _candidates(layer, group):
        if _unchanged(layer, group, candidate, before):
            return candidate
    return None


def _unchanged(layer: DecoderLayer, group: InputGroup, absorber: Absorber, before: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    scale = 0.5 + 1.5 * torch.rand(absorber.free, generator=generator)
    linears = [layer.linears[name] for name in group.names]
    with unharmed([absorber.module, *linears]):
        apply_scale(linears, absorber, scale.to(before.device))
        after = layer.calls[0].run(layer.module)
    return bool((after - before).abs().max() <= EXACT * before.abs().max())


def apply_scale(linears: Sequence[nn.Linear], absorber: Absorber, scale: Tensor) -> None:
    """Multiply the linears' columns by the spread of scale [free], and divide what the absorber puts out."""
    absorber.fold(scale)
    for linear in linears:
        linear.weight.data.mul_(absorber.spread(scale))


# ------------------------------------------------------------------------------------------------ candidates


def _candidates(layer: DecoderLayer, group: InputGroup) -> Iterator[Absorber]:
    width = group.gram.shape[0]
    for call in reversed(layer.trace[: group.position]):
        if any(id(parameter) in layer.shared for parameter in call.module.parameters()):
            continue  # other places would be scaled, too
        if isinstance(call.module, nn.Linear):
            yield from _rows(call, width, layer)
        elif call.output == group.key:
            yield from _norms(call, width)


def _norms(call: LeafCall, width: int) -> Iterator[Absorber]:
    """A norm multiplies by its weight, or by one more than its weight (Gemma's)."""
    weight = getattr(call.module, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != (width,):
        return
    bias = getattr(call.module, "bias", None)
    for one in (0.0, 1.0):

        def fold(scale: Tensor, one: float = one) -> None:
            weight.data.add_(one).div_(scale).sub_(one)
            if isinstance(bias, Tensor):
                bias.data.div_(scale)

        yield Absorber(call.name, call.module, fold, _same, _same, width)


def _rows(call: LeafCall, width: int, layer: DecoderLayer) -> Iterator[Absorber]:
    """All rows of an earlier linear, or the last or first of a fused one; each for several heads (grouped queries)."""
    linear = call.module
    assert isinstance(linear, nn.Linear)
    out = linear.out_features
    if out >= width:
        for start in {out - width: None, 0: None}:
            yield _row_absorber(call.name, linear, slice(start, start + width), _same, _same)
    dim, kv_heads = head_shape(layer.config, width)
    free = dim * kv_heads
    if 0 < free < width and width % free == 0 and out >= free:
        repeats = width // free

        def spread(scale: Tensor) -> Tensor:
            return scale.view(kv_heads, 1, dim).expand(kv_heads, repeats, dim).reshape(-1)

        def gather(values: Tensor) -> Tensor:
            return values.view(kv_heads, repeats, dim).mean(1).reshape(-1)

        yield _row_absorber(call.name, linear, slice(out - free, out), spread, gather)


def _row_absorber(
    name: str,
    linear: nn.Linear,
    rows: slice,
    spread: Callable[[Tensor], Tensor],
    gather: Callable[[Tensor], Tensor],
) -> Absorber:
    def fold(scale: Tensor) -> None:
        linear.weight.data[rows].div_(scale[:, None])
        if linear.bias is not None:
            linear.bias.data[rows].div_(scale)

    return Absorber(name, linear, fold, spread, gather, rows.stop - rows.start)


def head_shape(config: object, width: int) -> tuple[int, int]:
    """Return the width of a value head and the number of K/V heads; zeros where the config does not say."""
    heads, kv_heads = getattr(config, "num_attention_heads", 0), getattr(config, "num_key_value_heads", 0)
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or not heads:
        return 0, 0
    return width // heads, kv_heads


def _same(values: Tensor) -> Tensor:
    return values
