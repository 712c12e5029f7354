"""The plugin answers for GGUF files only, and is cheap until it is asked."""

import subprocess
import sys

import pytest

import core_gguf
from core.config import EngineConfig
from core.errors import CheckpointError
from core.spec import ModelSpec


def test_it_declines_what_is_not_gguf(tmp_path, options):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").touch()
    assert core_gguf.provide_checkpoint(str(tmp_path), options) is None
    assert core_gguf.provide_checkpoint(str(tmp_path / "config.json"), options) is None
    assert core_gguf.provide_checkpoint("owner/model", options) is None
    assert core_gguf.provide_tokenizer(ModelSpec(tmp_path, "hf", {}), options) is None


def test_a_folder_with_one_gguf_file_is_that_file(write_gguf, tiny, options):
    path = write_gguf(*tiny, name="MODEL.GGUF")
    found = core_gguf.provide_checkpoint(str(path.parent), options)
    assert (found.spec.path, found.spec.format) == (path, "gguf")


def test_a_folder_with_two_gguf_files_is_refused_with_their_names(tmp_path, options):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files: a\.gguf, b\.gguf"):
        core_gguf.provide_checkpoint(str(tmp_path), options)


def test_an_empty_folder_is_declined(tmp_path, options):
    assert core_gguf.provide_checkpoint(str(tmp_path), options) is None


def test_a_gguf_file_that_does_not_exist_is_an_error(tmp_path, options):
    with pytest.raises(CheckpointError, match=r"none\.gguf does not exist"):
        core_gguf.provide_checkpoint(str(tmp_path / "none.gguf"), options)


def test_another_tokenizer_that_the_user_names_is_left_to_others(tmp_path):
    spec = ModelSpec(tmp_path, "gguf", {})
    assert core_gguf.provide_tokenizer(spec, EngineConfig(tokenizer="elsewhere")) is None


def _imports(code):
    code += (
        "\nimport sys; print(*sorted({'torch', 'transformers', 'tokenizers', 'numpy', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_importing_the_plugin_imports_nothing_heavy():
    assert _imports("import core_gguf") == []


def test_opening_a_model_and_its_tokenizer_imports_neither_torch_nor_transformers(smollm2_path):
    code = f"""
import core_gguf
from core.config import EngineConfig
options = EngineConfig()
checkpoint = core_gguf.provide_checkpoint({str(smollm2_path)!r}, options)
core_gguf.provide_tokenizer(checkpoint.spec, options).encode("hello")
"""
    assert _imports(code) == ["numpy", "tokenizers"]
