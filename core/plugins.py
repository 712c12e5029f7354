"""PluginHost: registers plugins, asks them in the order of their names and names the one at fault.

The only file that builds a PluginManager, and the only one that calls hooks. Implementations are called one by one, in
pluggy's order, because every answer has to be known by its plugin; hook wrappers, which could change the answer of
another plugin unseen, are refused.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

import core
from core import builtin, hookspecs
from core.choice import Choice, Wish, choose
from core.contracts import Bid, Refusal
from core.errors import CheckpointError, ConfigError, PluginError
from core.plugin_checks import HOOKS, check_hooks
from core.plugin_loading import BUILTIN, Candidate, Loaded, bring_in, find
from core.plugin_report import PluginInfo
from core.quant_claims import nobody_quantizes, settle_claims

if TYPE_CHECKING:
    import click
    from fastapi import FastAPI

    from core.config import EngineConfig
    from core.contracts import (
        AttentionBackend,
        Checkpoint,
        Model,
        Quantizer,
        QuantizeSettings,
        QuantMethod,
        RequestRecord,
        StepStats,
        Tokenizer,
    )
    from core.kernel_contracts import Kernels
    from core.server.client import EngineClient
    from core.spec import ModelSpec


class PluginHost:
    """Every plugin of one process. Made by `load`."""

    def __init__(
        self, manager: pluggy.PluginManager, plugins: tuple[PluginInfo, ...], disabled: tuple[str, ...] = ()
    ) -> None:
        self.plugins = plugins  # in the order in which they are asked, the core's own last
        self.disabled = disabled  # names that were blocked
        # pluggy keeps the first to call at the end of its list.
        self._impls = {name: tuple(reversed(getattr(manager.hook, name).get_hookimpls())) for name in HOOKS}
        self._trace = os.environ.get("CORE_TRACE_PLUGINS", "") not in ("", "0")

    @classmethod
    def load(cls, disable: Sequence[str] = (), extra: Mapping[str, object] = {}) -> PluginHost:
        """Find, import, check and register all plugins but the disabled ones.

        `extra` are plugins that are not installed, by name. Raises ConfigError for an unknown name in `disable`,
        PluginError for a plugin that cannot be used.
        """
        own = Candidate(BUILTIN, "core-serve", core.__version__, lambda: builtin)
        loaded = [bring_in(candidate) for candidate in [*find(disable, extra), own]]
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        for one in reversed(loaded):  # the last registered is asked first
            _register(manager, one)
        return cls(manager, tuple(_info(manager, one) for one in loaded), tuple(disable))

    # -------------------------------------------------------------------------------------- the resolved set

    @property
    def resolved(self) -> tuple[tuple[str, str], ...]:
        """(name, version) of every plugin; handed to each worker process, which checks it."""
        return tuple((plugin.name, plugin.version) for plugin in self.plugins)

    def check_resolved(self, expected: Iterable[Sequence[str]]) -> None:
        """Raise PluginError, listing both sides, unless this process has just the plugins of `expected`."""
        theirs = tuple((name, version) for name, version in expected)
        if theirs != self.resolved:
            raise PluginError(
                f"This process does not have the plugins of the one that started it. Expected: {_listed(theirs)}. "
                f"Found: {_listed(self.resolved)}. Start both from one environment, with the same --disable-plugin."
            )

    # -------------------------------------------------------------------------------------- start-up

    def open_checkpoint(self, path: str, options: EngineConfig) -> Checkpoint:
        """Open a folder, a file or a model of the local cache. Raises CheckpointError saying who was asked."""
        from core.weights import find_locally

        where = find_locally(path)
        asked = path if where is None else str(where)
        _, found = self._first("provide_checkpoint", path=asked, options=options)
        if found is None:
            raise CheckpointError(self._nobody_opens(path, exists=where is not None))
        checkpoint: Checkpoint = found
        return checkpoint

    def _nobody_opens(self, path: str, exists: bool) -> str:
        from core.weights import describe, not_found

        asked = ", ".join(impl.plugin_name for impl in self._impls["provide_checkpoint"])
        return f"{describe(path)} Asked: {asked}." if exists else f"{not_found(path)} Asked: {asked}."

    def tokenizer(self, spec: ModelSpec, options: EngineConfig) -> Tokenizer:
        """Make the checkpoint's tokenizer. Raises CheckpointError if no plugin has one."""
        _, found = self._first("provide_tokenizer", spec=spec, options=options)
        if found is None:
            raise CheckpointError(
                f"No plugin has a tokenizer for {spec.path} (format {spec.format!r}). Name a folder that holds one "
                f"with --tokenizer-path, or serve token ids only with --skip-tokenizer-init."
            )
        tokenizer: Tokenizer = found
        return tokenizer

    def quant_method(self, spec: ModelSpec, options: EngineConfig) -> QuantMethod | None:
        """Return the one method that takes this checkpoint, None if it is not quantized and none is asked for."""
        return settle_claims(list(self._ask("provide_quant_method", spec=spec, options=options)), spec, options)

    def quantizer(self, method: str, settings: QuantizeSettings) -> Quantizer:
        """Return what makes checkpoints by a method. Raises ConfigError, saying what to install, if nobody does."""
        _, found = self._first("provide_quantizer", method=method, settings=settings)
        if found is None:
            raise ConfigError(nobody_quantizes(method))
        quantizer: Quantizer = found
        return quantizer

    def kernels(self, device: str, options: EngineConfig) -> Kernels | None:
        """Return the first plugin's kernels for a device, None if everything is to be computed with torch."""
        _, found = self._first("provide_kernels", device=device, options=options)
        kernels: Kernels | None = found
        return kernels

    def choose_model(self, spec: ModelSpec, options: EngineConfig) -> Choice[Model]:
        """Ask everybody for a model implementation and rank the answers as --model-impl says."""
        wish = Wish("model implementation", "--model-impl", options.model_impl, options.prefer, has_native=True)
        return choose(self._bids("resolve_model_impl", spec, options), wish)

    def choose_attention(self, spec: ModelSpec, options: EngineConfig) -> Choice[AttentionBackend]:
        """Ask everybody for an attention backend and rank the answers as --attention-backend says."""
        name = options.attention_backend_name or "auto"
        wish = Wish("attention backend", "--attention-backend", name, options.prefer)
        return choose(self._bids("resolve_attention_backend", spec, options), wish)

    def register_commands(self, cli: click.Group) -> None:
        """Let every plugin add subcommands. Raises PluginError if one takes a name that is in use."""
        for impl in self._impls["register_commands"]:
            before = dict(cli.commands)
            self._call("register_commands", impl, {"cli": cli})
            for name, command in before.items():
                if cli.commands.get(name) is not command:
                    raise PluginError(
                        f"Plugin {impl.plugin_name!r} replaces the command {name!r}, which is already there. "
                        f"Go on without it: --disable-plugin {impl.plugin_name}"
                    )

    def register_routes(self, app: FastAPI, engine: EngineClient) -> None:
        """Let every plugin add routes."""
        for impl in self._impls["register_routes"]:
            self._call("register_routes", impl, {"app": app, "engine": engine})

    # -------------------------------------------------------------------------------------- observers

    def on_step(self, stats: StepStats) -> None:
        for impl in self._impls["on_step"]:
            self._call("on_step", impl, {"stats": stats})

    def on_request_finished(self, record: RequestRecord) -> None:
        for impl in self._impls["on_request_finished"]:
            self._call("on_request_finished", impl, {"record": record})

    # -------------------------------------------------------------------------------------- asking

    def _bids(self, hook: str, spec: ModelSpec, options: EngineConfig) -> list[tuple[str, Bid[Any] | Refusal]]:
        answers: list[tuple[str, Bid[Any] | Refusal]] = []
        for plugin, answer in self._ask(hook, spec=spec, options=options):
            for one in answer if isinstance(answer, (list, tuple)) else [answer]:
                if not isinstance(one, (Bid, Refusal)):
                    raise PluginError(
                        f"Plugin {plugin!r} answered {hook} with {one!r}; right is a Bid, a Refusal, a list of them or "
                        f"None. Go on without it: --disable-plugin {plugin}"
                    )
                answers.append((plugin, one))
        return answers

    def _first(self, hook: str, **arguments: Any) -> tuple[str, Any]:
        return next(self._ask(hook, **arguments), ("", None))

    def _ask(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Yield (plugin, answer) of everybody who does not answer None, in order; asks no further than is taken."""
        for impl in self._impls[hook]:
            answer = self._call(hook, impl, arguments)
            if answer is not None:
                yield impl.plugin_name, answer

    def _call(self, hook: str, impl: pluggy.HookImpl, arguments: Mapping[str, Any]) -> Any:
        """Call one implementation. What it raises goes on, with the plugin's name added."""
        try:
            answer = impl.function(*[arguments[name] for name in impl.argnames])
        except Exception as error:
            error.add_note(f"raised by plugin {impl.plugin_name!r} in its hook {hook}")
            raise
        if self._trace:
            print(f"core-serve: hook {hook}: {impl.plugin_name} -> {answer!r}", file=sys.stderr)
        return answer


def _register(manager: pluggy.PluginManager, loaded: Loaded) -> None:
    """Register one plugin. Raises PluginError for a hook that pluggy, or we, would otherwise pass over."""
    check_hooks(loaded)
    try:
        manager.register(loaded.plugin, name=loaded.candidate.name)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        text = " ".join(str(error).split())
        raise loaded.candidate.unusable(f"does not fit the hooks of this core-serve: {text}.") from error


def _info(manager: pluggy.PluginManager, loaded: Loaded) -> PluginInfo:
    implemented = {caller.name for caller in manager.get_hookcallers(loaded.plugin) or ()}
    own = loaded.candidate
    hooks = tuple(name for name in HOOKS if name in implemented)
    return PluginInfo(own.name, own.distribution, own.version, hooks, loaded.api, loaded.import_seconds)


def _listed(resolved: Iterable[Sequence[str]]) -> str:
    return ", ".join(f"{name} {version}" for name, version in resolved) or "none"
