"""What a mask means. transformers hands a function of (query, key) positions to the registered mask interface; what it
lets through is read off once, at load, so that no mask is ever built while serving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from core.attention.interface import visible
from core.contracts import AttentionArgs

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
FAR = 1 << 22  # further than any context
GRID = 96  # positions that are compared one by one


@dataclass(frozen=True)
class Mask:
    """The meaning of one mask of the model; stands where transformers expects a tensor."""

    window: int | None = None
    chunk: int | None = None
    unknown: str | None = None  # why its meaning could not be read


def read_mask(function: MaskFunction) -> Mask:
    """Find window or chunk by asking the function which keys a far query sees, then check the answer on a grid."""
    try:
        mask = _guess(function)
        seen, q, k = _grid(function)
    except Exception as error:  # noqa: BLE001 - the model's own function may fail in any way outside its batch
        return Mask(
            unknown=f"its mask function fails outside the batch it was made for ({type(error).__name__}: {error})"
        )
    args = AttentionArgs(scaling=1.0, window=mask.window, chunk=mask.chunk)
    if not torch.equal(seen.expand(len(q), k.shape[1]), visible(q, k, args)):
        return Mask(unknown="its mask is neither causal, nor a sliding window, nor chunks")
    return mask


def _ask(function: MaskFunction, q: Tensor, k: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.int64)
    return torch.as_tensor(function(zero, zero, q, k))


def _grid(function: MaskFunction) -> tuple[Tensor, Tensor, Tensor]:
    positions = torch.arange(GRID)
    q, k = positions[:, None], positions[None, :]
    return _ask(function, q, k), q, k


def _guess(function: MaskFunction) -> Mask:
    first, second = _oldest_seen(function, FAR), _oldest_seen(function, FAR + 1)
    if first == 0 and second == 0:
        return Mask()
    if second == first + 1:
        return Mask(window=FAR - first + 1)
    return Mask(chunk=_chunk_size(function))


def _oldest_seen(function: MaskFunction, query: int) -> int:
    """Bisect for the oldest key that `query` sees, taking for granted that it sees all later ones."""
    low, high = 0, query
    at = torch.tensor(query)
    while low < high:
        middle = (low + high) // 2
        if bool(_ask(function, at, torch.tensor(middle))):
            high = middle
        else:
            low = middle + 1
    return low


def _chunk_size(function: MaskFunction) -> int:
    """The first position that does not see position 0."""
    low, high = 1, FAR
    while low < high:
        middle = (low + high) // 2
        if bool(_ask(function, torch.tensor(middle), torch.tensor(0))):
            low = middle + 1
        else:
            high = middle
    return low
