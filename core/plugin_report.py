"""What `core-serve plugins` shows: one line a plugin, as table and as JSON."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PluginInfo:
    """A registered plugin."""

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...]  # in the order of core/hookspecs.py
    api: str  # the API version or range it states; "" for none
    import_seconds: float


def plugins_json(plugins: Sequence[PluginInfo]) -> list[dict[str, Any]]:
    return [asdict(plugin) for plugin in plugins]


def plugins_text(plugins: Sequence[PluginInfo], width: int = 120) -> str:
    """Return the table of plugins, in the order in which they are asked."""
    from rich.table import Table

    table = Table("plugin", "distribution", "version", "API", "import", "hooks", title_justify="left")
    for plugin in plugins:
        seconds = f"{plugin.import_seconds * 1000:.0f} ms"
        hooks = "\n".join(plugin.hooks)
        table.add_row(plugin.name, plugin.distribution, plugin.version, plugin.api, seconds, hooks)
    return render(table, width)


def render(table: Any, width: int) -> str:
    """Return anything that rich can print as plain text of at most `width` columns."""
    from rich.console import Console

    page = io.StringIO()
    Console(file=page, width=width, markup=False, emoji=False, highlight=False).print(table)
    return page.getvalue()
