"""--kv-cache-dtype: K and V in fewer bytes than the model computes in."""

import pytest

from core import LLM
from core.config import EngineConfig
from core.errors import ConfigError
from core.testing import tiny_checkpoint


def opened(folder, **options):
    llm = LLM(model=str(folder), skip_tokenizer_init=True, kv_cache_memory=2**18, max_num_seqs=512, **options)
    info = llm.info
    llm.close()
    return info


def test_half_the_bytes_make_twice_the_blocks(tmp_path):
    folder = tiny_checkpoint("llama", tmp_path)
    single, double = opened(folder), opened(folder, kv_cache_dtype="bfloat16")
    assert double.num_blocks == 2 * single.num_blocks
    assert opened(folder, kv_cache_dtype="float32").num_blocks == single.num_blocks


def test_an_unknown_dtype_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match=r"kv_cache_dtype 'fp8' is unknown; choose one of auto, float32, bfloat16"):
        EngineConfig(kv_cache_dtype="fp8")


def test_a_model_that_keeps_no_kv_refuses_a_dtype_for_it(tmp_path):
    folder = tiny_checkpoint("mamba", tmp_path)
    with pytest.raises(ConfigError, match="keeps its own state and no K/V in blocks"):
        opened(folder, kv_cache_dtype="float16")
