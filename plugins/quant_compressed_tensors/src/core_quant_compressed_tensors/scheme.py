"""What a compressed-tensors config says of a module: which of its groups names it, and how that stores weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ConfigError

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")

ENTRIES = {"num_bits": (int,), "group_size": (int,), "symmetric": (bool,), "strategy": (str,)}  # and their types


@dataclass(frozen=True)
class Scheme:
    """One entry of config_groups: how its weights are stored."""

    group: str  # its name there, for messages
    targets: tuple[str, ...]
    bits: int
    is_float: bool
    strategy: str
    group_size: int | None  # of strategy "group"
    block: tuple[int, int] | None  # of strategy "block": rows, columns
    symmetric: bool
    quantizes_inputs: bool
    is_packed: bool = False  # several codes in an int32

    def names(self, module: str) -> bool:
        """True if a target is this module's name or a pattern of it; a class ("Linear") names no module by itself."""
        return matches(module, self.targets)


def read_schemes(config: Mapping[str, Any], where: object) -> list[Scheme]:
    """Return the config's groups. Raises ConfigError for whatever the plugin does not read."""
    _refuse(config, where)
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError(f"{where} is quantized with compressed-tensors and has no config_groups.")
    return [_read(name, group, config.get("format"), where) for name, group in groups.items()]


def _refuse(config: Mapping[str, Any], where: object) -> None:
    status = config.get("quantization_status", "compressed")
    if status != "compressed":
        raise ConfigError(f"{where} has quantization_status {status!r}; save it compressed.")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise ConfigError(f"{where} has sparse weights ({sparsity!r}), which this plugin does not read.")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise ConfigError(f"{where} transforms activations (transform_config), which this plugin does not do.")


def _read(name: str, group: Mapping[str, Any], overall: str | None, where: object) -> Scheme:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ConfigError(f"Group {name!r} of {where} has no weights to read; it says {group!r}.")
    stored = group.get("format") or overall
    if stored not in FORMATS:
        raise ConfigError(f"Group {name!r} of {where} is in format {stored!r}; this plugin reads {', '.join(FORMATS)}.")
    for entry, kinds in ENTRIES.items():
        if weights.get(entry) is not None and type(weights[entry]) not in kinds:
            raise ConfigError(
                f"Group {name!r} of {where} has weights of {entry} {weights[entry]!r}, which is no value."
            )
    group_size, kind = weights.get("group_size"), weights.get("type", "int")
    strategy = weights.get("strategy") or _implied(group_size)
    found = Scheme(
        group=name,
        targets=tuple(group.get("targets") or ()),
        bits=weights.get("num_bits", 8),
        is_float=kind == "float",
        strategy=strategy,
        group_size=group_size if strategy == "group" else None,
        block=_block(weights.get("block_structure")) if strategy == "block" else None,
        symmetric=weights.get("symmetric") is not False,
        quantizes_inputs=bool(group.get("input_activations")),
        is_packed=stored == "pack-quantized",
    )
    if strategy == "group" and (group_size or 0) < 1:
        raise ConfigError(f"Group {name!r} of {where} has weights of strategy 'group' and group_size {group_size!r}.")
    bits = (8,) if found.is_float else (4, 8)
    if found.bits not in bits or kind not in ("int", "float") or strategy not in STRATEGIES:
        raise ConfigError(
            f"Group {name!r} of {where} has weights of {found.bits} bits, type {kind!r}, strategy {strategy!r}; this "
            f"plugin reads int of 4 and 8 bits and float of 8, by {', '.join(STRATEGIES)}."
        )
    return found


def _implied(group_size: int | None) -> str:
    if group_size is None:
        return "tensor"
    return "group" if group_size > 0 else "channel"


def _block(stated: object) -> tuple[int, int] | None:
    if isinstance(stated, str):  # as older versions write it: "128x128"
        stated = [int(size) for size in stated.split("x")]
    return (stated[0], stated[1]) if isinstance(stated, list) else None


def scheme_of(module: str, schemes: Iterable[Scheme]) -> Scheme | None:
    """Return the scheme of a module that the file holds quantized: one that names it, else one that names a class."""
    listed = list(schemes)
    named = [scheme for scheme in listed if scheme.names(module)]
    by_class = [scheme for scheme in listed if any(_is_class(target) for target in scheme.targets)]
    return next(iter(named or by_class), None)


def matches(module: str, targets: Iterable[str]) -> bool:
    """True if a target is the module's name, or a pattern ("re:...") that fits its start."""
    for target in targets:
        pattern = target.removeprefix("re:")
        if target == module or (target != pattern and re.match(pattern, module)):
            return True
    return False


def _is_class(target: str) -> bool:
    return target.isidentifier()  # no dots, no pattern
