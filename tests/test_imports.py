"""Imports point one way, and what has to be quick to import imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import core

ROOT = Path(core.__file__).parent
HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "safetensors", "huggingface_hub", "numpy")

# A module may import its own row and those above it. Modules that are not listed are checked by the folder they are in.
LAYERS = [
    {"errors", "json_files", "threads", "reach", "memory"},
    {"spec", "config", "sampling_params", "outputs", "engine_info"},
    {"request", "batch", "contracts", "hookspecs"},
    {"safetensors_file"},
    {"blocks", "window_blocks", "model_loader", "attention", "layers", "kernels", "weights", "demo"},
    {"quant_weights"},
    {"scheduler", "plugin_loading", "plugin_checks", "plugin_report", "choice", "quant_claims", "builtin", "plugins"},
    {"runner", "sampler", "sampling", "tokenizer", "detokenizer"},
    {"plain_module"},
    {
        "kv_memory",
        "engine_build",
        "engine",
        "llm",
        "testing",
        "testing_checkpoints",
        "testing_configs",
        "testing_echo",
        "metrics",
        "probe",
    },
    {
        "verify",
        "verify_compare",
        "verify_layers",
        "verify_measure",
        "verify_plain",
        "verify_report",
        "verify_served",
        "verify_texts",
    },
    {"quantize"},
    {"eval_quant", "eval_quant_report"},
    {"supported_check", "supported_models", "supported_page", "supported_results"},
    {"server"},
    {"bench"},
    {"cli", "commands"},
]
ROW = {name: index for index, names in enumerate(LAYERS) for name in names}


def imported(tree):
    """Yield the modules of core that a file imports when it runs: not those under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "core" and node.level == 0:
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("core.")]
        yield from imported(node)


FILES = sorted(file.relative_to(ROOT) for file in ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_one_way(file):
    own = file.parts[0].removesuffix(".py")
    if own not in ROW or file.name == "builtin.py":  # builtin is the core's plugin: it imports what it offers, lazily
        return
    for name in imported(ast.parse((ROOT / file).read_text())):
        if name in ROW:
            assert ROW[name] <= ROW[own], f"core/{file} imports core.{name}, which is built on top of it"


def loaded_by(code):
    script = f"import sys; {code}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "code",
    [
        "import core",
        "import core.scheduler, core.blocks, core.request",
        "import core.cli",
        "from core.plugins import PluginHost; PluginHost.load()",
        "import core.server.start",  # what starts the engine's process
        "from core.cli import run; run(['--help'])",
        "from core.cli import run; run(['plugins'])",
    ],
)
def test_what_must_be_quick_imports_nothing_heavy(code):
    assert loaded_by(code) == []


def test_llm_is_loaded_when_it_is_first_asked_for():
    assert "torch" in loaded_by("from core import LLM")


def test_the_public_names_are_there():
    for name in core.__all__:
        assert hasattr(core, name)


def test_only_the_plugin_host_builds_a_plugin_manager_and_calls_hooks():
    for file in FILES:
        text = (ROOT / file).read_text()
        if file.name != "plugins.py" or len(file.parts) > 1:
            assert "PluginManager(" not in text, file
            assert ".hook." not in text, file
