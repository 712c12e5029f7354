"""Per-request state of any shape, as trees: what a transformers module carries from step to step.

A state is whatever `generate` would hand to the next step: caches of any class, tuples of tensors, numbers. Which
dimension of a tensor is the batch and which grows with the text is learned from short prefills, so that states of
several requests can be put side by side and taken apart again: texts of any length, padded on the left (Schema), or
texts of one length only (EqualLengths).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Path = tuple[str | int, ...]
Leaf = Callable[[Path, list[Any]], Any]
PLAIN = (int, float, bool, str, bytes, type(None), Tensor)


class CannotBatch(Exception):
    """Why states cannot stand side by side; names the place in the tree."""


def combine(states: list[Any], leaf: Leaf, path: Path = ()) -> Any:
    """Walk equally built trees together; return a new tree of what `leaf(path, values)` makes of their leaves."""
    first = states[0]
    if isinstance(first, PLAIN) or any(isinstance(state, PLAIN) for state in states):
        return leaf(path, states)
    if isinstance(first, dict):
        _check_same(path, [set(state) for state in states])
        made = {key: combine([state[key] for state in states], leaf, (*path, key)) for key in first}
        return made if type(first) is dict else _rebuilt(first, made)
    if isinstance(first, (list, tuple)):
        _check_same(path, [len(state) for state in states])
        items = [combine(list(values), leaf, (*path, at)) for at, values in enumerate(zip(*states, strict=True))]
        return items if type(first) is list else tuple(items)
    if _is_opaque(first):
        return first
    made_object = copy.copy(first)
    _check_same(path, [set(vars(state)) for state in states])
    for name in vars(first):
        made_object.__dict__[name] = combine([vars(state)[name] for state in states], leaf, (*path, name))
    return made_object


def _rebuilt(first: Any, made: dict[Any, Any]) -> Any:
    """A dict of another class (an OrderedDict, a ModelOutput): the same class with the new values."""
    rebuilt = copy.copy(first)
    for key, value in made.items():
        rebuilt[key] = value
    return rebuilt


def _is_opaque(value: Any) -> bool:
    """Things that say how to compute, not what was computed: they are shared, not combined."""
    if isinstance(value, (nn.Module, type, torch.dtype, torch.device)) or callable(value):
        return True
    return not hasattr(value, "__dict__") or hasattr(value, "model_type")  # model_type: a config


def _check_same(path: Path, values: Sequence[Any]) -> None:
    if any(value != values[0] for value in values):
        raise CannotBatch(f"{show(path)} is built differently from request to request")


def show(path: Path) -> str:
    return ".".join(map(str, path)) or "the state"


@dataclass(frozen=True)
class Dims:
    """What the dimensions of one tensor mean."""

    batch: int
    tokens: int | None  # the one that grows with the text


class Schema:
    """What each leaf of a model's state means. Learned from prefills of one text of 5 tokens, of 9, and of two of 5."""

    SHORT, LONG = 5, 9

    def __init__(self, short: Any, longer: Any, two: Any) -> None:
        self.dims: dict[Path, Dims] = {}
        self.lengths: set[Path] = set()  # numbers that count the text's tokens
        combine([short, longer, two], self._learn)

    def _learn(self, path: Path, values: list[Any]) -> None:
        short, longer, two = values
        if isinstance(short, Tensor) and isinstance(longer, Tensor) and isinstance(two, Tensor):
            if _counts(short, longer, self.LONG - self.SHORT) and _equal(short, two):
                self.lengths.add(path)
            else:
                self._learn_tensor(path, short.shape, longer.shape, two.shape)
        elif type(short) is int and type(longer) is int and longer - short == self.LONG - self.SHORT:
            self.lengths.add(path)

    def _learn_tensor(self, path: Path, short: torch.Size, longer: torch.Size, two: torch.Size) -> None:
        if not len(short) == len(longer) == len(two):
            raise CannotBatch(f"{show(path)} changes its number of dimensions")
        batch = [at for at, (one, both) in enumerate(zip(short, two, strict=True)) if (one, both) == (1, 2)]
        grows = [at for at, (a, b) in enumerate(zip(short, longer, strict=True)) if a != b]
        if not batch:
            if short != two or grows:
                raise CannotBatch(f"{show(path)} has no batch dimension ({list(short)}, {list(two)})")
            return  # the same for all requests
        if len(grows) > 1 or (grows and not 0 < longer[grows[0]] - short[grows[0]] <= self.LONG - self.SHORT):
            raise CannotBatch(f"{show(path)} does not grow by one for each token ({list(short)}, {list(longer)})")
        self.dims[path] = Dims(batch[0], grows[0] if grows else None)

    # ------------------------------------------------------------------------------------------ putting together

    def merge(self, states: list[Any], widths: list[int]) -> Any:
        """Put states of `widths` tokens side by side, as one of max(widths) tokens; shorter rows begin with padding."""
        width = max(widths)

        def leaf(path: Path, values: list[Any]) -> Any:
            if path in self.dims and all(isinstance(value, Tensor) for value in values):
                return _side_by_side(path, self.dims[path], values)
            if path in self.lengths:
                values = [value + width - own for value, own in zip(values, widths, strict=True)]
            return _the_same(path, values)

        return combine(states, leaf)

    # ------------------------------------------------------------------------------------------ taking apart

    def select(self, state: Any, rows: Tensor, width: int, kept: int) -> Any:
        """Return the rows [n] of a state of `width` tokens, without the `width - kept` first columns."""
        dropped = width - kept

        def leaf(path: Path, values: list[Any]) -> Any:
            value = values[0]
            dims = self.dims.get(path)
            if dims is not None and isinstance(value, Tensor):
                return _cut(value.index_select(dims.batch, rows), dims, width, kept)
            return value - dropped if path in self.lengths else _own(value)

        return combine([state], leaf)


class EqualLengths:
    """What each leaf of a model's state means, as far as texts of one length need it: which dimension is the batch.

    Nothing has to grow in a known way, so state may come in steps (compressed entries), or appear only past some
    length. A place that was not there before is learned when it is met, by prefills of that length.
    """

    def __init__(self, prefill: Callable[[int, int], Any]) -> None:
        """`prefill(texts, length)` returns the state after so many equal texts of `length` tokens each."""
        self.prefill = prefill
        self.batch: dict[Path, int | None] = {}  # None: the tensor is the same for all texts
        self._learn_at(Schema.SHORT)

    def _learn_at(self, length: int) -> None:
        with torch.inference_mode():
            combine([self.prefill(1, length), self.prefill(2, length)], self._learn)

    def _learn(self, path: Path, values: list[Any]) -> None:
        if all(isinstance(value, Tensor) for value in values):
            one, two = (list(value.shape) for value in values)
            found = [at for at, (a, b) in enumerate(zip(one, two, strict=True)) if (a, b) == (1, 2)]
            if not found and one != two:
                raise CannotBatch(f"{show(path)} has no batch dimension ({one}, {two})")
            self.batch[path] = found[0] if found else None

    def merge(self, states: list[Any], widths: list[int]) -> Any:
        """Put states of texts of one length side by side."""

        def leaf(path: Path, values: list[Any]) -> Any:
            if not all(isinstance(value, Tensor) for value in values):
                return _the_same(path, values)
            dim = self._batch_dim(path, widths[0])
            if dim is None:
                return _the_same(path, values)
            shapes = [[size for at, size in enumerate(value.shape) if at != dim] for value in values]
            _check_same(path, shapes)
            return torch.cat(values, dim)

        return combine(states, leaf)

    def select(self, state: Any, rows: Tensor, width: int, kept: int) -> Any:
        """Return the rows [n] of a state of `width` tokens; `kept` is `width`."""

        def leaf(path: Path, values: list[Any]) -> Any:
            dim = self._batch_dim(path, width) if isinstance(values[0], Tensor) else None
            return _own(values[0]) if dim is None else values[0].index_select(dim, rows)

        return combine([state], leaf)

    def _batch_dim(self, path: Path, length: int) -> int | None:
        if path not in self.batch:
            self._learn_at(length)
        if path not in self.batch:
            raise CannotBatch(f"{show(path)} is in no state that a prompt of {length} tokens leaves")
        return self.batch[path]


def _counts(short: Tensor, longer: Tensor, more: int) -> bool:
    """True if these are numbers of tokens: the longer text's are larger by what it has more."""
    if short.shape != longer.shape or short.is_floating_point() or short.dtype == torch.bool or not short.numel():
        return False
    return bool((longer - short == more).all())


def _own(value: Any) -> Any:
    """A copy that a model may write into without changing the state that it was taken from."""
    return value.clone() if isinstance(value, Tensor) else value


def _side_by_side(path: Path, dims: Dims, values: list[Tensor]) -> Tensor:
    shapes = [list(value.shape) for value in values]
    differing = [at for at in range(len(shapes[0])) if at != dims.batch and len({shape[at] for shape in shapes}) > 1]
    if len(differing) > 1:
        raise CannotBatch(f"{show(path)} differs in more than one dimension between requests")
    if differing:
        values = [_pad_left(value, differing[0], max(shape[differing[0]] for shape in shapes)) for value in values]
    return torch.cat(values, dims.batch)


def _pad_left(value: Tensor, dim: int, size: int) -> Tensor:
    missing = size - value.shape[dim]
    if not missing:
        return value
    shape = list(value.shape)
    shape[dim] = missing
    return torch.cat([value.new_zeros(shape), value], dim)


def _the_same(path: Path, values: list[Any]) -> Any:
    if not all(_equal(values[0], value) for value in values[1:]):
        raise CannotBatch(f"{show(path)} differs between requests ({', '.join(map(repr, values))[:80]})")
    return values[0]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return one is other or bool(type(one) is type(other) and one == other)


def _cut(value: Tensor, dims: Dims, width: int, kept: int) -> Tensor:
    """Drop padding columns. A tensor shorter than the text (a window's) holds the last tokens only."""
    if dims.tokens is None or width == kept:
        return value
    size = value.shape[dims.tokens]
    keep = size - (width - kept) if size >= width else min(size, kept)
    return value.narrow(dims.tokens, size - keep, keep)
