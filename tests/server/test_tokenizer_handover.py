"""The engine opens the model's tokenizer and hands it to the server, which needs no torch to use it."""

import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from core.config import EngineConfig
from core.plugins import PluginHost
from core.server.codec import take_tokenizer
from core.server.process import pickled
from core.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, chat_template="hello").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def opened(folder):
    config, host = EngineConfig(str(folder)), PluginHost.load()
    return host.tokenizer(host.open_checkpoint(str(folder), config).spec, config)


def test_a_tokenizer_that_is_handed_over_brings_no_torch(opened, tmp_path):
    file = tmp_path / "tokenizer"
    file.write_bytes(pickled(opened))
    code = (
        "import sys, pathlib\n"
        "from core.server.codec import take_tokenizer\n"
        "found = take_tokenizer(pathlib.Path(sys.argv[1]).read_bytes(), None, None)\n"
        "print(found.encode('hello world'), found.decode([2]), found.render_chat([{'role': 'user', 'content': ''}]))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[1, 2] world hello", "False"]


class Unpicklable:
    def __reduce__(self):
        raise TypeError("it holds a lock")


@pytest.mark.parametrize("given", [pickled(Unpicklable()), b"of a class that is not here"])
def test_a_tokenizer_that_cannot_be_handed_over_is_opened_anew(given, folder):
    found = take_tokenizer(given, EngineConfig(str(folder)), PluginHost.load())
    assert found.encode("hello world") == [1, 2]


def test_without_a_tokenizer_there_is_none():
    assert take_tokenizer(pickled(None), EngineConfig("echo", skip_tokenizer_init=True), PluginHost.load()) is None
