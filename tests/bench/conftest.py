"""A tiny random Llama, an engine of it, a server, and ceilings that are measured once."""

import pytest

from core.bench import subject
from core.bench.ceilings import measure_ceilings
from core.bench.server import running_server
from core.config import EngineConfig
from core.engine_build import build_engine
from core.plugins import PluginHost
from core.testing import VOCAB, tiny_checkpoint


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("bench"), max_position_embeddings=512)


@pytest.fixture(scope="session")
def speaking(tmp_path_factory):
    """The same with a tokenizer whose words are letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    where = tiny_checkpoint("llama", tmp_path_factory.mktemp("speaking"), max_position_embeddings=512)
    letters = Tokenizer(models.WordLevel({chr(code): code - 32 for code in range(32, 32 + VOCAB)}, unk_token=" "))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token=" ").save_pretrained(where)
    return where


@pytest.fixture(scope="session", autouse=True)
def ceilings_measured_once():
    """Two seconds in every report; the first one's serve for all."""
    known = {}

    def measured(device, dtype, kernels):
        key = device, dtype, kernels is None
        if key not in known:
            known[key] = measure_ceilings(device, dtype, kernels)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "measure_ceilings", measured)
        yield


@pytest.fixture(scope="session")
def server_url(speaking):
    with running_server(EngineConfig(model=str(speaking))) as url:
        yield url


@pytest.fixture(scope="session")
def host():
    return PluginHost.load()


@pytest.fixture(scope="session")
def make_engine(folder, host):
    """Return a function that builds an engine without a tokenizer."""

    def make(path=folder, **options):
        config = EngineConfig.from_options(model=str(path), skip_tokenizer_init=True, device="cpu", **options)
        return build_engine(config, host)

    return make


@pytest.fixture(scope="session")
def engine(make_engine):
    return make_engine()
