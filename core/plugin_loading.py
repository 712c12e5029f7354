"""Which plugins are installed, and bringing one in: blocked by name before import, its API version checked."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from itertools import pairwise

from core import API_VERSION
from core.errors import ConfigError, PluginError
from core.hookspecs import PROJECT

BUILTIN = "builtin"
Version = tuple[int, int]  # (major, minor)


@dataclass(frozen=True)
class Candidate:
    """A plugin that is installed, not yet imported."""

    name: str
    distribution: str
    version: str
    load: Callable[[], object]
    states_api: bool = True  # False: an object of the caller's own, which need not say what it was written for

    def unusable(self, what: str) -> PluginError:
        """Return the error that names plugin, distribution and version, and says how to go on."""
        return PluginError(
            f"Plugin {self.name!r} (distribution {self.distribution} {self.version}) {what} "
            f"Repair or upgrade it, or go on without it: --disable-plugin {self.name}"
        )


@dataclass(frozen=True)
class Loaded:
    """An imported plugin whose API fits."""

    candidate: Candidate
    plugin: object
    api: str  # "1.0", or "1.0-1.4"; "" if it states none
    import_seconds: float


def find(disable: Sequence[str], extra: Mapping[str, object]) -> list[Candidate]:
    """Return the plugins to load, in the order of their names. Nothing is imported here."""
    found = [_installed(entry) for entry in entry_points(group=PROJECT)]
    found += [_given(name, plugin) for name, plugin in extra.items()]
    _check_disabled(disable, sorted({candidate.name for candidate in found}))
    wanted = sorted((one for one in found if one.name not in disable), key=lambda one: one.name)
    for first, second in pairwise(wanted):
        if first.name == second.name:
            raise first.unusable(f"has the same name as the one of {second.distribution} {second.version}.")
    for candidate in wanted:
        if candidate.name == BUILTIN:
            raise candidate.unusable("uses the name of the core's own plugin.")
    return wanted


def _installed(entry: EntryPoint) -> Candidate:
    distribution = entry.dist
    if distribution is None:
        return Candidate(entry.name, "unknown", "unknown", entry.load)
    return Candidate(entry.name, distribution.name, distribution.version, entry.load)


def _given(name: str, plugin: object) -> Candidate:
    return Candidate(name, "given by the caller", "-", lambda: plugin, states_api=False)


def _check_disabled(disable: Sequence[str], installed: Sequence[str]) -> None:
    for name in disable:
        if name == BUILTIN:
            raise ConfigError("--disable-plugin builtin is not possible: the core's own hooks are always there.")
        if name not in installed:
            there = ", ".join(installed) or "none"
            raise ConfigError(f"--disable-plugin {name}: there is no plugin of that name. Installed: {there}.")


def bring_in(candidate: Candidate) -> Loaded:
    """Import one plugin and check its API version. Raises PluginError naming it."""
    started = time.perf_counter()
    try:
        plugin = candidate.load()
    except Exception as error:
        raise candidate.unusable(f"failed to import: {type(error).__name__}: {error}.") from error
    seconds = time.perf_counter() - started
    if inspect.isclass(plugin):
        raise candidate.unusable(
            f"is the class {plugin.__qualname__}; its entry point must name a module or an object."
        )
    return Loaded(candidate, plugin, _check_api(candidate, plugin), seconds)


def _check_api(candidate: Candidate, plugin: object) -> str:
    stated = _stated_range(candidate, plugin)
    if stated is None:
        return ""
    low, high = stated
    here = f"this core-serve has API {_text(API_VERSION)} and loads majors {API_VERSION[0] - 1} and {API_VERSION[0]}."
    if low > API_VERSION:
        raise candidate.unusable(f"needs API {_text(low)}, but {here} Upgrade core-serve.")
    if high[0] < API_VERSION[0] - 1:
        raise candidate.unusable(f"was written for API {_text(high)}, but {here}")
    return _text(low) if low == high else f"{_text(low)}-{_text(high)}"


def _stated_range(candidate: Candidate, plugin: object) -> tuple[Version, Version] | None:
    """Return (oldest, newest) API that the plugin was written for. A newer minor only adds, so it fits as well."""
    single, span = getattr(plugin, "CORE_API", None), getattr(plugin, "CORE_API_RANGE", None)
    if single is None and span is None:
        if not candidate.states_api:
            return None
        raise candidate.unusable(f"does not state its API version: it lacks `CORE_API = {API_VERSION}`.")
    if single is not None and span is not None:
        raise candidate.unusable("states both CORE_API and CORE_API_RANGE; one of them is enough.")
    low, high = (single, single) if span is None else _pair(candidate, span)
    oldest, newest = _version(candidate, low), _version(candidate, high)
    if oldest > newest:
        raise candidate.unusable(f"states CORE_API_RANGE {span!r}, which ends before it starts.")
    return oldest, newest


def _pair(candidate: Candidate, span: object) -> tuple[object, object]:
    if not isinstance(span, tuple) or len(span) != 2:
        raise candidate.unusable(f"states CORE_API_RANGE {span!r}; right is ((1, 0), (1, 4)).")
    return span


def _version(candidate: Candidate, value: object) -> Version:
    match value:
        case (int(major), int(minor)):
            return major, minor
    raise candidate.unusable(
        f"states the API version {value!r}, which is not a pair (major, minor). Right is "
        "CORE_API = (1, 0), or CORE_API_RANGE = ((1, 0), (1, 4))."
    )


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
