"""DecoderLayer: what a quantizer is given: one layer's linears, and the inputs that they see in calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from core.quantize.listen import listening
from core.quantize.march import Call

Key = tuple[int, int, int]  # address, elements, width: which memory a tensor is, while somebody holds it


@dataclass
class InputGroup:
    """Linears that multiply the same input, and what calibration says of it."""

    names: list[str]  # of the linears, within the layer
    key: Key
    position: int  # among the layer's leaf modules, in the order in which they ran
    gram: Tensor  # [in, in] float32: the mean of x.T @ x over tokens
    mean_abs: Tensor  # [in] float32: the mean of |x| over tokens
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Count the tokens of an input [..., in]; gram and mean_abs are sums until all are counted."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.gram = self.gram.to(rows.device).addmm_(rows.T, rows)
        self.mean_abs = self.mean_abs.to(rows.device) + rows.abs().sum(0)
        self.tokens += len(rows)


@dataclass
class LeafCall:
    """One call of a module without children: which memory it put out."""

    name: str
    module: nn.Module
    output: Key | None


@dataclass
class DecoderLayer:
    """One decoder layer, in floats. A quantizer may change it; what it computes in floats has to stay the same."""

    name: str  # in the model, e.g. "model.layers.3"
    module: nn.Module
    linears: Mapping[str, nn.Linear]  # those to quantize, by name within the layer; some are views of other modules
    calls: Sequence[Call] = ()  # one a sample; none for a quantizer that does not calibrate
    config: Any = None  # transformers' config of the decoder
    shared: frozenset[int] = frozenset()  # ids of parameters that stand in other places of the model too
    trace: list[LeafCall] = field(default_factory=list)  # filled by input_groups, from the first sample

    def input_groups(self) -> list[InputGroup]:
        """Run all samples and return the groups of linears, in the order in which they run first.

        A linear that no token reaches (an expert that nobody chooses) is in no group.
        """
        groups = self._find_groups()
        by_first = {group.names[0]: group for group in groups}
        with self._adding(by_first):
            for call in self.calls:
                call.run(self.module)
        for group in groups:
            group.gram /= max(group.tokens, 1)
            group.mean_abs /= max(group.tokens, 1)
        return [group for group in groups if group.tokens]

    def _find_groups(self) -> list[InputGroup]:
        """The first sample says which linears share an input; what it does not reach stays by itself."""
        found: set[str] = set()
        by_key: dict[Key, InputGroup] = {}
        held: list[Any] = []  # so that no address is used twice
        self.trace.clear()

        def note(names: Sequence[str], x: Tensor, output: Any) -> None:
            held.append((x, output))
            place, key = len(self.trace), key_of(x)
            self.trace.extend(LeafCall(name, self.linears[name], key_of(output)) for name in names)
            new = [name for name in names if name not in found]
            if not new or key is None:
                return
            found.update(new)
            if key not in by_key:
                by_key[key] = _empty_group(self.linears[new[0]].in_features, key, place, x.device)
            by_key[key].names.extend(new)

        def note_other(module: nn.Module, args: Any, output: Any) -> None:
            held.append((args, output))
            self.trace.append(LeafCall(paths[id(module)], module, key_of(output)))

        paths = {id(module): path for path, module in self.module.named_modules() if path not in self.linears}
        leaves = [part for part in self.module.modules() if id(part) in paths and next(part.children(), None) is None]
        hooks = [leaf.register_forward_hook(note_other) for leaf in leaves]
        try:
            with listening(self.module, self.linears, note):
                self.calls[0].run(self.module)
        finally:
            for hook in hooks:
                hook.remove()
        lone = [name for name in self.linears if name not in found]
        alone = [_empty_group(self.linears[name].in_features, (0, 0, 0), -1, torch.device("cpu")) for name in lone]
        for name, group in zip(lone, alone, strict=True):
            group.names.append(name)
        return [*by_key.values(), *alone]

    @contextmanager
    def _adding(self, groups: Mapping[str, InputGroup]) -> Iterator[None]:
        def add(names: Sequence[str], x: Tensor, output: Any) -> None:
            for name in names:
                if name in groups:
                    groups[name].add(x)

        with listening(self.module, self.linears, add):
            yield


@contextmanager
def unharmed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put the modules' own parameters back afterwards, bit for bit."""
    kept = [(parameter, parameter.detach().clone()) for module in modules for parameter in module.parameters(False)]
    try:
        yield
    finally:
        for parameter, value in kept:
            parameter.data.copy_(value)


def _empty_group(width: int, key: Key, place: int, device: torch.device) -> InputGroup:
    return InputGroup([], key, place, torch.zeros(width, width, device=device), torch.zeros(width, device=device))


def key_of(value: Any) -> Key | None:
    """Return which memory a tensor is, so that views of all of it are known as the same."""
    if not isinstance(value, Tensor) or not value.numel():
        return None
    return (value.data_ptr(), value.numel(), value.shape[-1])
