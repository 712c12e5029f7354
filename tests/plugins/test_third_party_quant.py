"""The plugin of docs/write-a-quant-plugin.md, taken from the page: installed by pip in a new environment, it serves."""

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from core.cli import run as cli
from core.testing import tiny_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "write-a-quant-plugin.md"
CLI = "import sys; from core.cli import main; sys.exit(main())"
CHECKS = """
import sys
from core.testing import assert_matches_dequantized as check
smaller, floats = sys.argv[1:]
print(check(smaller, "native"), check(smaller, "transformers"), check(floats, "auto", quantization="rows8"))
"""
pytestmark = pytest.mark.slow


def files_of(page):
    found = re.findall(r"^## [^\n]*: `([\w./]+)`\n.*?^```\w+\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return dict(found)


def test_the_page_holds_a_plugin_of_under_80_lines_of_code():
    files = files_of(PAGE)
    assert set(files) == {"pyproject.toml", "core_quant_rows8/__init__.py", "core_quant_rows8/method.py"}
    lines = [line for text in files.values() for line in text.splitlines() if line.strip()]
    assert len(lines) < 80


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a new environment on top of this one, with the page's plugin installed by pip."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    new = folder / "venv" / "bin" / "python"
    asked = [new, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    (Path(site) / "below.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    plugin = folder / "core-serve-quant-rows8"
    plugin.mkdir()
    for name, text in files_of(PAGE).items():
        (plugin / name).parent.mkdir(exist_ok=True)
        (plugin / name).write_text(text)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run([new, "-m", "pip", "install", *offline, plugin], check=True)
    return new


def run(python, code, *arguments):
    done = subprocess.run([python, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def smaller(python, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "smaller"
    assert "quantized: 28 linears" in run(python, CLI, "quantize", source, "--method", "rows8", "--output", out)
    return out


def test_what_it_makes_is_served_like_its_floats_and_so_is_a_float_checkpoint_on_the_fly(python, smaller, source):
    assert run(python, CHECKS, smaller, source).split() == ["native_llama", "transformers/paged", "native_llama"]


def test_its_weights_are_within_half_a_step_of_the_originals(smaller, source):
    from safetensors.torch import load_file

    held = {name: tensor for file in smaller.glob("*.safetensors") for name, tensor in load_file(file).items()}
    original = load_file(source / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    values, scale = (held[f"model.layers.1.mlp.up_proj.{part}"] for part in ("values", "row_scale"))
    assert values.dtype == torch.int8
    assert bool(((values * scale - original).abs() <= scale * 0.5001).all())


def test_without_the_plugin_the_error_says_what_to_install(smaller, capsys):
    assert cli(["generate", "hello", "--model-path", str(smaller), "--device", "cpu"]) == 1
    assert "pip install core-serve-quant-rows8" in capsys.readouterr().err
    assert json.loads((smaller / "config.json").read_text())["quantization_config"]["in_floats"] == ["lm_head"]
