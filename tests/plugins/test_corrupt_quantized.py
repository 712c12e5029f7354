"""Quantized checkpoints with one tensor spoilt: whichever it is, the error names it or its neighbour, and the file."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.config import EngineConfig
from core.contracts import QuantizeSettings
from core.errors import CheckpointError, ConfigError
from core.plugins import PluginHost
from core.quantize.run import QuantizeJob, quantize
from core.testing import tiny_checkpoint

SAMPLES = [[3 + (7 * i + i * i) % 90 for i in range(16)]]
GROUPED = {"group_size": 32}
MADE = {
    "awq": QuantizeSettings(**GROUPED),
    "gptq": QuantizeSettings(**GROUPED, desc_act=True),
    "int4": QuantizeSettings(**GROUPED, symmetric=False),
    "int8": QuantizeSettings(**GROUPED),
    "bnb-nf4": QuantizeSettings(),
    "bnb-int8": QuantizeSettings(),
}
MODULE = "model.layers.0.mlp.down_proj"
OPTIONAL = {"weight_format"}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Return a function: method -> the folder of a small checkpoint of one file, and its tensors."""
    host, made = PluginHost.load(), {}
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    source = tiny_checkpoint("llama", tmp_path_factory.mktemp("corrupt") / "source", **sizes)

    def made_by(method):
        if method not in made:
            folder = source.parent / method
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("core.quantize.run._samples", lambda *args: SAMPLES)
                quantize(QuantizeJob(str(source), method, folder, MADE[method]), host)
            tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
            for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
                file.unlink()
            made[method] = folder, tensors
        return made[method]

    return made_by


def read(folder):
    host, options = PluginHost.load(), EngineConfig(model=str(folder))
    checkpoint = host.open_checkpoint(str(folder), options)
    return dict(host.quant_method(checkpoint.spec, options).tensors(checkpoint, torch.float32))


def spoilt(tensor):
    """Yield what a part may be instead: of other shapes, of another type, not a number; None: gone."""
    yield None
    if tensor.dim():
        yield tensor[:-1]
        yield tensor[:0]
    if tensor.dim() == 2 and tensor.dtype != torch.uint8:
        yield tensor[:, :-1].contiguous()
    if tensor.is_floating_point():
        yield tensor.to(torch.int32)
        yield torch.full_like(tensor, float("nan"))
    elif tensor.dtype == torch.int32:
        yield tensor.float()


def is_noticed(method, part, tensor, value):
    if part in OPTIONAL:
        return False
    # A matrix of int8 says itself how wide it is: only the model's class knows that it is wrong.
    return not (method == "bnb-int8" and part == "weight" and value is not None and value.shape[0] == tensor.shape[0])


@pytest.mark.parametrize("method", MADE)
def test_a_spoilt_tensor_is_an_error_that_names_module_and_file(method, make):
    folder, tensors = make(method)
    parts = [name for name in tensors if name.startswith(f"{MODULE}.")]
    assert len(parts) > 1
    for name in parts:
        part = name.removeprefix(f"{MODULE}.")
        for value in spoilt(tensors[name]):
            if not is_noticed(method, part, tensors[name], value):
                continue
            left = {other: tensor for other, tensor in tensors.items() if other != name}
            save_file(left if value is None else left | {name: value}, folder / "model.safetensors")
            what = "missing" if value is None else f"{value.dtype} {list(value.shape)}"
            with pytest.raises(CheckpointError) as error:
                read(folder)
                raise AssertionError(f"{name}, {what}: was read")
            assert MODULE in str(error.value), (name, what, str(error.value))
            assert "model.safetensors" in str(error.value), (name, what, str(error.value))


@pytest.mark.parametrize("method", MADE)
def test_a_file_that_was_cut_off_is_an_error_that_names_it(method, make):
    folder, tensors = make(method)
    save_file(tensors, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    for size in (len(whole) - 100, len(whole) // 2, 20):
        (folder / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read(folder)


@pytest.mark.parametrize("method", ["awq", "gptq", "int4"])
@pytest.mark.parametrize("size", ["128", 0, -5, 48, []])
def test_a_group_size_that_is_none_or_does_not_fit_is_an_error(method, size, make):
    folder, tensors = make(method)
    save_file(tensors, folder / "model.safetensors")
    file = folder / "config.json"
    before = file.read_text()
    config = json.loads(before)
    stated = config["quantization_config"]
    (stated["config_groups"]["group_0"]["weights"] if method == "int4" else stated)["group_size"] = size
    file.write_text(json.dumps(config))
    try:
        with pytest.raises((CheckpointError, ConfigError), match="group"):
            read(folder)
    finally:
        file.write_text(before)
