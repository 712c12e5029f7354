"""The plugin of docs/write-a-model-plugin.md, taken from the page: installed by pip in a new environment, it serves."""

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "write-a-model-plugin.md"
CONFIG = {
    "model_type": "pico",
    "size": 32,
    "heads": 4,
    "layers": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}
CLI = "import sys; from core.cli import main; main()"
pytestmark = pytest.mark.slow


def files_of(page):
    """Return the page's files: a heading names one in code font, the next block is its text."""
    found = re.findall(r"^## [^\n]*: `([\w./]+)`\n.*?^```\w+\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return dict(found)


def test_the_page_holds_a_plugin_of_under_60_lines_of_code():
    files = files_of(PAGE)
    assert set(files) == {"pyproject.toml", "core_pico/__init__.py", "core_pico/model.py"}
    lines = [line for text in files.values() for line in text.splitlines() if line.strip()]
    assert len(lines) < 60


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(0)
    size, vocab = CONFIG["size"], CONFIG["vocab_size"]
    shapes = {"embed.weight": (vocab, size), "head.weight": (vocab, size)}
    for layer in range(CONFIG["layers"]):
        name = f"layers.{layer}"
        shapes |= {f"{name}.{part}.weight": (size, size) for part in ("q", "k", "v", "out")}
        shapes[f"{name}.norm.weight"] = (size,)
        shapes |= {f"{name}.mlp.{part}.weight": (2 * size, size) for part in ("gate_proj", "up_proj")}
        shapes[f"{name}.mlp.down_proj.weight"] = (size, 2 * size)
    return {name: torch.randn(shape, generator=generator) * size**-0.5 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tensors):
    """A folder with config.json, safetensors and a tokenizer whose words are w0 ... w31."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("pico")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / "model.safetensors")
    # The unknown word is special, so its text is left out; its id is one that the model never gives.
    vocabulary = {**{f"w{index}": index for index in range(CONFIG["vocab_size"])}, "<unk>": CONFIG["vocab_size"]}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a new environment on top of this one, with the page's plugin installed by pip."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    new = folder / "venv" / "bin" / "python"
    site = subprocess.run(
        [new, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # addsitedir, unlike a plain path, also reads the .pth files of editable installs there.
    (Path(site) / "below.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    source = folder / "core-serve-pico"
    source.mkdir()
    for name, text in files_of(PAGE).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run([new, "-m", "pip", "install", *offline, source], check=True)
    return new


def run(python, *arguments):
    """Run the real command line in the new environment."""
    done = subprocess.run([python, "-c", CLI, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def greedy_answer(tensors, ids, count):
    """The same decoder over the whole text at once, written down without core-serve."""
    for _ in range(count):
        ids = [*ids, int(plain_logits(tensors, ids)[-1].argmax())]
    return ids[-count:]


def plain_logits(tensors, ids):
    functional = torch.nn.functional
    size, heads = CONFIG["size"], CONFIG["heads"]
    dim, x = size // heads, tensors["embed.weight"][ids]
    angles = torch.arange(len(ids))[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    turn = torch.polar(torch.ones_like(angles), angles)  # [tokens, dim / 2]

    def rotate(part):
        halves = torch.complex(*part.chunk(2, -1)) * turn
        return torch.cat([halves.real, halves.imag], -1)

    for layer in range(CONFIG["layers"]):
        weights = {name.split(".", 2)[2]: w for name, w in tensors.items() if name.startswith(f"layers.{layer}.")}
        y = functional.rms_norm(x, (size,), weights["norm.weight"], 1e-6)
        q, k, v = ((y @ weights[f"{name}.weight"].T).view(len(ids), heads, dim).transpose(0, 1) for name in "qkv")
        seen = functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + seen.transpose(0, 1).reshape(len(ids), size) @ weights["out.weight"].T
        gate, up = y @ weights["mlp.gate_proj.weight"].T, y @ weights["mlp.up_proj.weight"].T
        x = x + (functional.silu(gate) * up) @ weights["mlp.down_proj.weight"].T
    return x @ tensors["head.weight"].T


def test_explain_names_the_plugin_that_serves_and_why_the_fallback_does_not(python, checkpoint):
    report = json.loads(run(python, "explain", checkpoint, "--device", "cpu", "--json"))["model_impl"]
    assert report["chosen"] == "pico"
    assert [bid["plugin"] for bid in report["bids"]] == ["pico"]
    assert report["bids"][0]["verdict"] == "serves: the only one"
    assert {one["plugin"] for one in report["declined"]} >= {"hf_fallback"}


def test_the_command_line_generates_what_the_plain_decoder_does(python, checkpoint, tensors):
    ids = [3, 17, 5, 28, 9, 11, 30]
    options = ["--model-path", checkpoint, "--max-tokens", 8, "--device", "cpu", "--chunked-prefill-size", 3]
    answer = run(python, "generate", " ".join(f"w{token}" for token in ids), "--raw", *options)
    assert answer.split() == [f"w{token}" for token in greedy_answer(tensors, ids, 8)]


def test_a_tensor_too_many_is_an_error_that_names_it(python, checkpoint, tensors, tmp_path):
    from safetensors.torch import save_file

    save_file({**tensors, "layers.7.out.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    command = ["generate", "w1", "--model-path", tmp_path, "--device", "cpu", "--skip-tokenizer-init"]
    done = subprocess.run([python, "-c", CLI, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Left over (1): layers.7.out.weight" in done.stderr
