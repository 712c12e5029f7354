"""Hears what goes into a layer's matrices while it runs: through hooks of its linears, and where an expert's rows of a
stack are multiplied, through torch itself."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Hear = Callable[[Sequence[str], Tensor, Any], None]  # names of matrices, what all of them multiply, what comes out


@contextmanager
def listening(layer: nn.Module, linears: Mapping[str, nn.Linear], hear: Hear) -> Iterator[None]:
    """Call `hear` whenever some of `linears` multiply, those of modules and those that are views of a stack."""
    modules = dict(layer.named_modules())
    hooks = [modules[name].register_forward_hook(_hook(name, hear)) for name in linears if name in modules]
    views = {name: linear for name, linear in linears.items() if name not in modules}
    try:
        if views:
            with _Products(views, hear):
                yield
        else:
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(name: str, hear: Hear) -> Any:
    def heard(module: nn.Module, args: Any, output: Any) -> None:
        hear([name], args[0], output)

    return heard


class _Products(TorchFunctionMode):
    """Looks at every F.linear for weights that views lie in. Gate and up of an expert are often one product."""

    def __init__(self, views: Mapping[str, nn.Linear], hear: Hear) -> None:
        super().__init__()
        self.hear = hear
        self.places = sorted((linear.weight.data_ptr(), name) for name, linear in views.items())

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is F.linear and len(args) > 1:
            names = self._within(args[1])
            if names:
                self.hear(names, args[0], out)
        return out

    def _within(self, weight: Tensor) -> list[str]:
        begin = weight.data_ptr()
        end = begin + weight.numel() * weight.element_size()
        first, last = (bisect_left(self.places, (address, "")) for address in (begin, end))
        return [name for _, name in self.places[first:last]]
