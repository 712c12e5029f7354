"""Named rules that make a module of transformers quicker without changing what it computes. Imports no torch.

A rule knows a module by its shape and by what it does when it is tried, never by a model's name. The probe that
compares the paged tier with the plain module runs with the patches on, so a rule that is wrong for a model is found,
named in the log and left out.

merged-linears   linears that are given the very same tensor become one product (Q, K and V; gate and up)
rms-norm         x / sqrt(mean(x^2) + eps) times w or 1 + w in four operations instead of eight
gated-mlp        down(activation(gate(x)) * up(x)) in three calls
grouped-experts  the experts of a mixture in two products over rows sorted by expert, on a GPU
attention-block  projections, norms by head, rotation, attention and output in as few calls as that
decoder-layer    x + attention(norm(x)), then + mlp(norm(that)), where additions join the norms that follow them
layer-stack      such layers one after the other in a single call, where the device has kernels for it
child-lookup     a module finds its children without nn.Module.__getattr__
"""

from __future__ import annotations

from collections.abc import Iterable

from core.errors import ConfigError

NAMES = (
    "merged-linears",
    "rms-norm",
    "gated-mlp",
    "grouped-experts",
    "attention-block",
    "decoder-layer",
    "layer-stack",
    "child-lookup",
)


def check_names(names: Iterable[str]) -> None:
    """Raise ConfigError if one of these is no patch."""
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"There is no patch {name!r} to disable; there are {', '.join(NAMES)}.")
