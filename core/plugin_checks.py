"""Whether a plugin's functions are hooks: nothing misspelt, undecorated or wrapped passes by unseen."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from core import hookspecs
from core.plugin_loading import Loaded

HOOKS = tuple(name for name, spec in vars(hookspecs).items() if hasattr(spec, f"{hookspecs.PROJECT}_spec"))


def check_hooks(loaded: Loaded) -> None:
    """Raise PluginError for a hook that would otherwise be passed over, or that changes what others answer."""
    hooks = _implementations(loaded.plugin)
    for name, options in hooks.items():
        hook = options.get("specname") or name
        if hook not in HOOKS and not options.get("optionalhook"):
            near = get_close_matches(hook, HOOKS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Hooks are: {', '.join(HOOKS)}."
            raise loaded.candidate.unusable(f"implements {hook}, which is no hook. {hint}")
        if options.get("wrapper") or options.get("hookwrapper"):
            raise loaded.candidate.unusable(f"wraps the hook {hook}; wrappers are not supported, answer it plainly.")
    for name in HOOKS:
        if name not in hooks and callable(getattr(loaded.plugin, name, None)):
            raise loaded.candidate.unusable(f"defines {name} without @hookimpl, so it would never be called.")
    if not hooks:
        raise loaded.candidate.unusable("implements no hook; decorate its functions with core.hookimpl.")


def _implementations(plugin: object) -> dict[str, Mapping[str, Any]]:
    """Return the options of every function that @hookimpl marked, by its name in the plugin."""
    marked = {name: getattr(getattr(plugin, name, None), f"{hookspecs.PROJECT}_impl", None) for name in dir(plugin)}
    return {name: options for name, options in marked.items() if isinstance(options, dict)}
