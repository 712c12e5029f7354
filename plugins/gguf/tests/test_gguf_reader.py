"""A GGUF file is read as it was written, and a broken one is refused with its name and what is wrong."""

import gguf
import numpy as np
import pytest

from core.errors import CheckpointError
from core_gguf.reader import GGUFFile


def test_metadata_of_every_kind_comes_back(write_gguf):
    written = {
        "a.text": "naïve ▁",
        "a.flag": True,
        "a.number": 7,
        "a.real": 0.5,
        "a.names": ["x", "", "日本"],
        "a.list": [1, 2],
    }
    file = GGUFFile.open(write_gguf(written, {"t": np.ones((2, 3), np.float32)}))
    assert {key: file.metadata[key] for key in written if key != "a.list"} == {
        key: value for key, value in written.items() if key != "a.list"
    }
    assert file.metadata["a.list"].tolist() == [1, 2]


def test_gguf_s_own_reader_finds_the_same_tensors(write_gguf, tiny):
    blocks = (np.zeros((3, 40), np.uint8), gguf.GGMLQuantizationType.Q4_1)
    path = write_gguf(tiny[0], tiny[1] | {"odd": np.ones((2, 3, 5), np.float16), "blocks": blocks})
    own = GGUFFile.open(path)
    theirs = gguf.GGUFReader(path)
    assert len(own.tensors) == len(theirs.tensors)
    for tensor in theirs.tensors:
        info = own.tensors[tensor.name]
        assert info.shape == tuple(tensor.shape.tolist())[::-1]
        assert (info.type.name, info.start, info.nbytes) == (
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
        )


def test_a_missing_key_and_a_key_of_another_kind_are_named(write_gguf):
    file = GGUFFile.open(write_gguf({"a.number": 7}, {}))
    with pytest.raises(CheckpointError, match=r"lacks the key 'a\.other'"):
        file.require("a.other", int)
    with pytest.raises(CheckpointError, match=r"'a\.number' is 7, but str is needed"):
        file.require("a.number", str)


def test_every_cut_of_the_head_is_refused(write_gguf, tiny, tmp_path):
    whole = write_gguf(tiny[0] | {"a.names": ["one", "two"], "a.list": [1, 2, 3]}, tiny[1]).read_bytes()
    head = whole.index(b"output_norm.weight") + 60
    cut = tmp_path / "cut.gguf"
    for size in range(head):
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GGUFFile.open(cut)


def test_a_tensor_cut_off_at_the_end_is_named(write_gguf, tiny, tmp_path):
    whole = write_gguf(*tiny).read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:-65])
    with pytest.raises(CheckpointError, match=r"'output_norm\.weight' ends at byte .* after the file's end"):
        GGUFFile.open(cut)


@pytest.mark.parametrize(
    ("at", "value", "problem"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, (1).to_bytes(4, "little"), "GGUF version 1"),
        (4, (99).to_bytes(4, "little"), "GGUF version 99"),
        (4, (3).to_bytes(4, "big"), "big-endian"),
        (8, (2**60).to_bytes(8, "little"), "corrupt"),
        (16, (2**60).to_bytes(8, "little"), "corrupt"),
        (24, (2**63).to_bytes(8, "little"), "after the file's end"),
    ],
)
def test_a_damaged_header_is_refused(write_gguf, tiny, at, value, problem):
    path = write_gguf(*tiny)
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=problem):
        GGUFFile.open(path)


def _damage(path, name, place, value):
    """Overwrite the entry of a tensor with two dimensions: name | count u32 | dims 2 u64 | type u32 | offset u64."""
    data = bytearray(path.read_bytes())
    at = data.index(name.encode()) + len(name) + {"count": 0, "dim": 4, "type": 20, "offset": 24}[place]
    data[at : at + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        ("count", (9).to_bytes(4, "little"), "has 9 dimensions"),
        ("dim", (0).to_bytes(8, "little"), "cannot hold"),
        ("type", (77).to_bytes(4, "little"), "unknown type 77"),
        ("type", (3).to_bytes(4, "little"), None),  # Q4_1 takes rows of 32: possible, and smaller
        ("offset", (2**40).to_bytes(8, "little"), "after the file's end"),
        ("offset", (5).to_bytes(8, "little"), "off the alignment"),
    ],
)
def test_a_damaged_tensor_entry_is_refused_by_name(write_gguf, tiny, place, value, problem):
    path = write_gguf(*tiny)
    _damage(path, "token_embd.weight", place, value)
    if problem is None:
        assert GGUFFile.open(path).tensors["token_embd.weight"].type.name == "Q4_1"
        return
    with pytest.raises(CheckpointError, match=f"token_embd.weight.*{problem}"):
        GGUFFile.open(path)


def test_a_string_that_is_not_utf8_is_refused_with_its_key(write_gguf, tiny):
    path = write_gguf(tiny[0] | {"a.text": "abcdefgh"}, tiny[1])
    path.write_bytes(path.read_bytes().replace(b"abcdefgh", b"abc\xff\xfefgh"))
    with pytest.raises(CheckpointError, match=r"'a\.text'.*not UTF-8"):
        GGUFFile.open(path)


def test_an_array_longer_than_the_file_is_refused_with_its_key(write_gguf, tiny):
    path = write_gguf(tiny[0] | {"a.names": ["one", "two"]}, tiny[1])
    data = bytearray(path.read_bytes())
    at = data.index(b"a.names") + 7 + 4 + 4
    data[at : at + 8] = (2**50).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"'a\.names' claims"):
        GGUFFile.open(path)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "empty.gguf"
    path.touch()
    with pytest.raises(CheckpointError, match=r"empty\.gguf"):
        GGUFFile.open(path)
