"""Does a model count tokens by itself? Follows arithmetic on `arange(number of tokens)` up to the attention calls.

In a flat batch a token's place in the row says nothing about its position. A model that scales queries by such a count
may show no difference on a few tokens and be wrong thousands later (a temperature that starts at position 8192), so it
is not enough to compare outputs. Lookups by such a count are left to the probe, which sees them at once; only
arithmetic is followed, since mixtures of experts use the same count harmlessly as an index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

LOOKUPS = frozenset(
    {"__getitem__", "index_select", "gather", "take", "index_add", "index_add_", "scatter", "__setitem__"}
)


class CountedTokens(TorchFunctionMode):
    """While active, marks what is computed from arange(count)."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.active = True
        self._marked: dict[int, Tensor] = {}  # kept alive, so that an id names one tensor

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if not self.active:
            return result
        if name == "arange":
            if result.numel() == self.count:
                self._mark(result)
        elif self._marked:
            sources = args[:1] if name in LOOKUPS else (*args, *kwargs.values())
            if any(id(tensor) in self._marked for tensor in tensors_in(sources)):
                for tensor in tensors_in((result,)):
                    self._mark(tensor)
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what runs inside: it is the host's, not the model's."""
        active, self.active = self.active, False
        try:
            yield
        finally:
            self.active = active

    def _mark(self, tensor: Tensor) -> None:
        self._marked[id(tensor)] = tensor

    def reaches(self, *tensors: Tensor) -> bool:
        """True if one of `tensors` was computed from the count."""
        return any(id(tensor) in self._marked for tensor in tensors)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among values and, one level down, in their lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Tensor))
