"""DecoderLayer: what a quantizer is given: one layer's linears, and the inputs that they see in calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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
    linears: Mapping[str, nn.Linear]  # those to quantize, by name within the layer
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
        with self._listening(by_first):
            for call in self.calls:
                call.run(self.module)
        for group in groups:
            group.gram /= max(group.tokens, 1)
            group.mean_abs /= max(group.tokens, 1)
        return [group for group in groups if group.tokens]

    def _find_groups(self) -> list[InputGroup]:
        """The first sample says which linears share an input; what it does not reach stays by itself."""
        names = {id(module): name for name, module in self.linears.items()}
        found: dict[str, InputGroup] = {}
        by_key: dict[Key, InputGroup] = {}
        self.trace.clear()

        def note(module: nn.Module, args: Any, output: Any) -> None:
            held.append((args, output))  # so that no address is used twice
            place = len(self.trace)
            self.trace.append(LeafCall(paths[id(module)], module, key_of(output)))
            name, key = names.get(id(module)), key_of(args[0] if args else None)
            if name is None or name in found or key is None:
                return
            if key not in by_key:
                by_key[key] = _empty_group(self.linears[name].in_features, key, place, args[0].device)
            by_key[key].names.append(name)
            found[name] = by_key[key]

        held: list[Any] = []
        paths = {id(module): path for path, module in self.module.named_modules()}
        leaves = [module for module in self.module.modules() if next(module.children(), None) is None]
        hooks = [leaf.register_forward_hook(note) for leaf in leaves]
        try:
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
    def _listening(self, groups: Mapping[str, InputGroup]) -> Iterator[None]:
        hooks = [self.linears[name].register_forward_pre_hook(_adder(group)) for name, group in groups.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def unharmed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put the modules' own parameters back afterwards, bit for bit."""
    kept = [(parameter, parameter.detach().clone()) for module in modules for parameter in module.parameters(False)]
    try:
        yield
    finally:
        for parameter, value in kept:
            parameter.data.copy_(value)


def _adder(group: InputGroup) -> Any:
    def add(module: nn.Module, args: Any) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1]).float()
        group.gram = group.gram.to(rows.device).addmm_(rows.T, rows)
        group.mean_abs = group.mean_abs.to(rows.device) + rows.abs().sum(0)
        group.tokens += len(rows)

    return add


def _empty_group(width: int, key: Key, place: int, device: torch.device) -> InputGroup:
    return InputGroup([], key, place, torch.zeros(width, width, device=device), torch.zeros(width, device=device))


def key_of(value: Any) -> Key | None:
    """Return which memory a tensor is, so that views of all of it are known as the same."""
    if not isinstance(value, Tensor) or not value.numel():
        return None
    return (value.data_ptr(), value.numel(), value.shape[-1])
