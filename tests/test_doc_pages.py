"""The pages hold together: links lead somewhere, files and names that they mention exist, words are used as defined."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("plugins/*/README.md"))]
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
LIFE = (ROOT / "docs" / "life-of-a-request.md").read_text()
TERMS = re.findall(r"^\| \*\*(.+?)\*\* \| (.+?) \| `(.+?)` \|$", GLOSSARY, re.MULTILINE)


def prose(page):
    """A page's text without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_is_python(page):
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        is_signature = re.fullmatch(r"def [^\n]*\n", block)  # as docs/hooks.md prints them
        ast.parse(f"{block.rstrip()}: ..." if is_signature else block)


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, f"docs/index.md does not link to {page.name}"


@pytest.mark.parametrize("file", sorted(set(re.findall(r"(?:`|\")((?:core|plugins)/[\w./]+)", LIFE))))
def test_a_file_that_the_life_of_a_request_names_exists(file):
    assert (ROOT / file).exists()


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("core/engine.py", ["add", "abort", "step"]),
        ("core/scheduler.py", ["schedule", "advance", "complete"]),
        ("core/runner.py", ["run"]),
        ("core/sampler.py", ["sample"]),
        ("core/emit.py", ["take"]),
        ("core/server/openai.py", ["ChatRequest"]),
        ("core/request.py", ["ClientRequest", "Request", "ScheduledTokens"]),
        ("core/batch.py", ["Batch"]),
    ],
)
def test_a_function_that_the_life_of_a_request_names_exists(file, names):
    tree = ast.parse((ROOT / file).read_text())
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for name in names:
        assert re.search(rf"\b{name}\b", LIFE), name
        assert name in defined


def test_the_readme_lists_every_hook():
    from core.plugin_checks import HOOKS

    table = (ROOT / "README.md").read_text().split("## What can be plugged in")[1].split("Plugins bid")[0]
    assert tuple(re.findall(r"`((?:register|provide|resolve|on)_\w+)`", table)) == HOOKS


def test_the_readme_lists_the_fallbacks_tiers_with_their_priorities():
    from core_hf_fallback.bids import FAMILY, TIERS

    readme = (ROOT / "README.md").read_text()
    for tier, priority in TIERS.items():
        assert f"| `{FAMILY}/{tier}` | {priority} |" in readme


def test_the_readmes_commands_are_verbs_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    verbs = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert verbs == ["serve", "test"]
    for verb in verbs:
        assert re.search(rf"^{verb}:", makefile, re.MULTILINE)


def test_the_documented_port_is_the_default():
    from core.server.options import ServerOptions

    for page in (ROOT / "README.md", ROOT / "docs" / "quickstart.md"):
        assert set(re.findall(r"127\.0\.0\.1:(\d+)", page.read_text())) == {str(ServerOptions.port)}


def test_the_quickstarts_commands_are_there():
    from core.cli import COMMANDS

    known = {command.name for command in COMMANDS}
    used = set(re.findall(r"^core-serve (\w+)", (ROOT / "docs" / "quickstart.md").read_text(), re.MULTILINE))
    assert used
    assert used <= known


@pytest.mark.parametrize(("term", "meaning", "file"), TERMS, ids=[term for term, _, _ in TERMS])
def test_a_glossary_term_is_explained_and_its_file_exists(term, meaning, file):
    assert (ROOT / file).is_file()
    assert len(meaning) > 10


def test_no_term_is_defined_twice():
    terms = [term for term, _, _ in TERMS]
    assert len(terms) == len(set(terms)) > 25


@pytest.mark.parametrize("word", re.findall(r'Not "(\w+)"', GLOSSARY))
def test_a_word_that_the_glossary_rules_out_is_not_used_by_the_pages(word):
    for page in PAGES:
        if page.name not in ("glossary.md", "cli.md"):  # cli.md: SGLang's own flag names
            hits = [line for line in prose(page).splitlines() if re.search(rf"\b{word}s?\b", line, re.IGNORECASE)]
            assert [line for line in hits if not re.search(r"this page|from the page|pages?:|--page", line, re.I)] == []
