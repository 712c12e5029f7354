"""Rotary modules whose rotation of a token depends on the longest text beside it: each text is rotated as if alone.

In transformers a rope of type dynamic or longrope chooses its frequencies by the largest position of a forward, and may
keep them for the next one. `generate` runs a prompt in one forward and then token by token, so there

    a prompt's tokens go by the prompt's length          L = tokens of the prompt
    every later token goes by its own                    L = position + 1

Which modules are of this kind is not read off a name but tried: does the rotation of the first positions change when a
far position stands beside them? The length at which it begins to change, and whether it goes on changing (dynamic) or
changes once (longrope), decides how many tokens of a batch share one call.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from core.batch import Batch
from core.errors import UnsupportedAttention

logger = logging.getLogger("core_serve.transformers")
SHOWN = 4  # positions whose rotation is compared
GROWING = ("dynamic", "longrope")  # transformers' names; only used for modules that cannot be tried


class LengthRope:
    """Stands in the place of one such module's forward."""

    def __init__(self, module: nn.Module, name: str, leading: tuple[int, ...]) -> None:
        """`leading` is the shape of its positions before [texts, tokens]."""
        self.module, self.name, self.leading = module, name, leading
        self.plain: Callable[..., Any] = module.forward
        self.thresholds: dict[str | None, int] = {}  # by layer type: up to this length nothing depends on it
        self.steps: dict[str | None, bool] = {}  # by layer type: past the threshold all lengths are alike
        self.lengths: Sequence[int] | None = None  # of each token of the flat row; None: rows are whole texts

    # ------------------------------------------------------------------------------------------ what it is

    def learn(self, kind: str | None, max_length: int) -> bool:
        """Find the threshold for one layer type; False if no length up to `max_length` changes anything."""
        short = self._first(kind, SHOWN)
        if _equal(short, self._first(kind, max_length)):
            return False
        low, high = SHOWN, max_length  # the rotation at `low` is that of a short text, at `high` it is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _equal(short, self._first(kind, middle)) else (low, middle)
        self.thresholds[kind] = low
        just_past, far = self._first(kind, high), self._first(kind, max_length)
        self.steps[kind] = _equal(just_past, far) and _equal(just_past, self._first(kind, (high + max_length) // 2))
        return True

    def _first(self, kind: str | None, length: int) -> list[Tensor]:
        """The rotation of the first positions of a text of `length` tokens."""
        positions = torch.tensor([*range(SHOWN), length - 1], device=_device(self.module))
        arguments = {} if kind is None else {"layer_type": kind}
        x = torch.zeros(1, SHOWN + 1, 1, device=positions.device)
        found = self._fresh(x, positions.expand(*self.leading, 1, -1), arguments)
        return [part.narrow(1, 0, SHOWN) for part in _tensors(found)]

    # ------------------------------------------------------------------------------------------ in its place

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """x [texts, tokens, hidden], position_ids [..., texts, tokens] -> what the module gives for each text alone."""
        arguments = {} if layer_type is None else {"layer_type": layer_type}
        threshold = self.thresholds.get(layer_type)
        lengths = self._lengths_of(position_ids)
        if threshold is None or max(lengths) <= threshold:
            return self._fresh(x, position_ids, arguments)
        groups: dict[int, list[int]] = {}  # length -> places of its tokens
        for place, length in enumerate(lengths):
            alike = SHOWN if length <= threshold else threshold + 1 if self.steps[layer_type] else length
            groups.setdefault(alike, []).append(place)
        return self._by_groups(x, position_ids, arguments, groups)

    def _lengths_of(self, position_ids: Tensor) -> Sequence[int]:
        """The text length that each of the texts * tokens positions goes by."""
        texts, tokens = position_ids.shape[-2:]
        if self.lengths is None:
            longest = position_ids.reshape(-1, texts, tokens).amax((0, 2)) + 1
            return longest.repeat_interleave(tokens).tolist()  # type: ignore[no-any-return]
        if texts * tokens != len(self.lengths):
            raise UnsupportedAttention(
                f"{self.name} rotates {texts * tokens} positions of a batch of {len(self.lengths)} tokens."
            )
        return self.lengths

    def _by_groups(self, x: Tensor, position_ids: Tensor, arguments: Any, groups: dict[int, list[int]]) -> Any:
        """Run each group of tokens as one text, to which a last position is added that makes it as long as it is."""
        texts, tokens = position_ids.shape[-2:]
        flat = position_ids.flatten(-2).unsqueeze(-2)  # [..., 1, texts * tokens]
        order = torch.tensor([place for places in groups.values() for place in places], device=flat.device)
        back = order.argsort()
        found = []
        for length, places in groups.items():
            own = flat[..., torch.tensor(places, device=flat.device)]
            last = own.new_full((*own.shape[:-1], 1), length - 1)
            found.append(self._fresh(x, torch.cat([own, last], -1), arguments))
        return _joined(found, lambda parts: _merge(self.name, parts, groups, back, (texts, tokens)))

    def _fresh(self, x: Tensor, position_ids: Tensor, arguments: dict[str, Any]) -> Any:
        """Call the module and undo what it keeps of the call."""
        attributes, buffers = dict(vars(self.module)), dict(self.module._buffers)
        values = {name: buffer.clone() for name, buffer in buffers.items() if buffer is not None}
        try:
            return self.plain(x, position_ids, **arguments)
        finally:
            vars(self.module).update(attributes)
            for name, buffer in buffers.items():
                if buffer is not None:
                    buffer.copy_(values[name])
                self.module._buffers[name] = buffer


class Ropes:
    """All of a model's rotary modules that depend on the length."""

    def __init__(self, module: nn.Module, max_length: int) -> None:
        """Find them and put a LengthRope into each. `max_length`: the longest text that will be served."""
        self.found: list[LengthRope] = []
        self.unknown: str | None = None  # a module that says it is one and cannot be tried
        for name, part in module.named_modules():
            leaf = not part._parameters and not part._modules
            if leaf and max_length > SHOWN and "position_ids" in inspect.signature(part.forward).parameters:
                self._try(name, part, max_length)
        crossed = {n: when_crossing(module, n + 1) for n in sorted(self.thresholds)}
        self.restart_after = next((n for n, does in crossed.items() if does == "anew"), None)
        self.forgets_after = next((n for n, does in crossed.items() if does == "forgets"), None)
        if self.found:
            logger.info("%s rotates by the length of a text; each text is rotated as if alone", self.names)

    def __bool__(self) -> bool:
        return bool(self.found)

    @property
    def names(self) -> str:
        return ", ".join(rope.name for rope in self.found)

    @property
    def thresholds(self) -> set[int]:
        return {threshold for rope in self.found for threshold in rope.thresholds.values()}

    def _try(self, name: str, part: nn.Module, max_length: int) -> None:
        types = getattr(part, "rope_type", None)
        kinds: Sequence[str | None] = list(types) if isinstance(types, dict) else [None]
        says = set(types.values()) if isinstance(types, dict) else {types}
        for leading in ((), (3,)):  # positions [texts, tokens], or three of them: time, height, width
            rope = LengthRope(part, name, leading)
            try:
                depends = [rope.learn(kind, max_length) for kind in kinds]
            except Exception:  # noqa: BLE001 - anybody's module, called with a guess: it may fail in any way
                continue
            if any(depends):
                self.found.append(rope)
                part.forward = rope  # type: ignore[method-assign]
            return
        self.unknown = self.unknown or (name if says & set(GROWING) else None)

    @contextmanager
    def flat(self, lengths: Sequence[int]) -> Iterator[None]:
        """While active, positions are those of a flat batch, by `lengths`; else each row of them is a whole text."""
        for rope in self.found:
            rope.lengths = lengths
        try:
            yield
        finally:
            for rope in self.found:
                rope.lengths = None


def when_crossing(module: Any, length: int) -> str:
    """Say what `generate` does with a text of `length` tokens when the cache holds all but the last one.

    "goes on"; "anew": it computes the text whole, without the cache; "forgets": it drops the cache and runs the last
    token alone, as an older transformers does where it means to compute anew.
    """
    if not hasattr(module, "prepare_inputs_for_generation"):
        return "goes on"
    from transformers import DynamicCache

    class Holding(DynamicCache):
        def __len__(self) -> int:
            return 1

        def get_seq_length(self, *_: Any) -> int:
            return length - 1

    ids = torch.zeros(1, length, dtype=torch.int64)
    inputs = module.prepare_inputs_for_generation(
        ids,
        next_sequence_length=1,
        past_key_values=(holding := Holding()),
        attention_mask=torch.ones_like(ids),
        use_cache=True,
    )
    if inputs["input_ids"].shape[1] > 1:
        return "anew"
    return "goes on" if inputs.get("past_key_values") is holding else "forgets"


def text_lengths(batch: Batch, restart: int | None) -> list[int]:
    """Return, for each token of a batch, the length of text that `generate` would have rotated it by.

    `restart`: the model computes a text anew when it grows past so many tokens, as if it were a prompt then.
    """
    lengths: list[int] = []
    for entry in batch.scheduled:
        prompt = entry.request.num_prompt
        if restart is not None and prompt <= restart < entry.request.num_tokens:
            prompt = restart + 1
        lengths += [max(prompt, position + 1) for position in range(entry.start, entry.end)]
    return lengths


def _device(module: nn.Module) -> torch.device | None:
    return next((buffer.device for buffer in module.buffers()), None)


def _tensors(found: Any) -> list[Tensor]:
    parts = found if isinstance(found, (list, tuple)) else (found,)
    return [part for part in parts if isinstance(part, Tensor)]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _joined(found: list[Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """Join what several calls gave: tensors, or tuples of tensors."""
    if isinstance(found[0], Tensor):
        return join(found)
    return type(found[0])(join(list(parts)) for parts in zip(*found, strict=True))


def _merge(
    name: str, parts: list[Tensor], groups: dict[int, list[int]], back: Tensor, shape: tuple[int, int]
) -> Tensor:
    """Drop each part's added position and put the tokens back into their places: [texts, tokens, ...]."""
    counts = [len(places) for places in groups.values()]
    if any(part.shape[:2] != (1, count + 1) for part, count in zip(parts, counts, strict=True)):
        raise UnsupportedAttention(f"{name} does not give one rotation for each position; its text cannot be split.")
    flat = torch.cat([part[0, :-1] for part in parts]).index_select(0, back)
    return flat.view(*shape, *flat.shape[1:])
