"""The documentation says what the code does: a heading a hook with its signature, and the generated command line."""

import inspect
import re
from pathlib import Path

import pytest

from core import hookspecs
from core.plugin_checks import HOOKS

DOCS = Path(__file__).parent.parent / "docs"


def sections(page):
    """Return a page's second-level sections by heading, in order."""
    parts = re.split(r"^## (.+)$", (DOCS / page).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_hook_has_a_heading_in_the_order_of_the_contract():
    assert tuple(sections("hooks.md")) == HOOKS


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hooks_documented_signature_is_the_real_one(hook):
    real = f"def {hook}{inspect.signature(getattr(hookspecs, hook))}".replace("'", "")
    assert f"```python\n{real}\n```" in sections("hooks.md")[hook]


def test_the_documented_command_line_is_the_real_one():
    from core.commands.reference import reference

    assert reference() in (DOCS / "cli.md").read_text(), "docs/cli.md is out of date: run `make docs`"
