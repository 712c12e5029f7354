"""A tiny random Llama, and an engine of it."""

import pytest

from core.config import EngineConfig
from core.engine_build import build_engine
from core.plugins import PluginHost
from core.testing import tiny_checkpoint


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("bench"), max_position_embeddings=512)


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
