"""Quantized checkpoints with one tensor spoilt: whichever it is, the error names it or its neighbour, and the file."""

import json
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.config import EngineConfig
from core.contracts import QuantizeSettings
from core.errors import CheckpointError, ConfigError
from core.layers import QuantizedTensor
from core.llm import LLM
from core.plugins import PluginHost
from core.quantize.run import QuantizeJob, quantize
from core.testing import packed_checkpoint, tiny_checkpoint

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
E4M3 = torch.float8_e4m3fn


def blocks(weight):
    """Values in float8 and a scale for each block of 16 x 32."""
    by_block = weight.unflatten(0, (-1, 16)).unflatten(2, (-1, 32))
    scales = by_block.abs().amax((1, 3)) / 448
    return {"weight": (by_block / scales[:, None, :, None]).to(E4M3).view(weight.shape), "weight_scale_inv": scales}


def rows(weight):
    scales = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": (weight / scales).to(E4M3), "weight_scale": scales}


def one_scale(weight):
    return {"weight": (weight / weight.abs().max() * 448).to(E4M3), "weight_scale_inv": weight.abs().max() / 448}


def whole_numbers(weight):
    scales = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scales).round().to(torch.int8), "weight_scale": scales}


def compressed(form, **weights):
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel", **weights}}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return config | {"ignore": ["lm_head"]}


# What no quantizer makes: the config and the parts of a weight.
PACKED = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 32]}, blocks),
    "fp8-tensor": ({"quant_method": "fp8", "weight_block_size": None}, one_scale),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, rows),
    "w8a8": (compressed("int-quantized", type="int"), whole_numbers),
    "w8a8-fp8": (compressed("float-quantized", type="float"), rows),
}
METHODS = (*MADE, *PACKED)
ONE_A_ROW = ("bnb-int8", "fbgemm_fp8", "w8a8", "w8a8-fp8")
ONE_A_VALUE = (*ONE_A_ROW, "fp8", "fp8-tensor")  # a byte of the matrix is a weight


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Return a function: method -> the folder of a small checkpoint of one file, and its tensors."""
    host, made = PluginHost.load(), {}
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    source = tiny_checkpoint("llama", tmp_path_factory.mktemp("corrupt") / "source", **sizes)

    def made_by(method):
        if method not in made:
            folder = source.parent / method
            if method in PACKED:
                config, pack = PACKED[method]
                packed_checkpoint(source, folder, config, lambda n, w: pack(w) if n.endswith("_proj.weight") else None)
            else:
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
    if tensor.is_floating_point() and tensor.dtype != E4M3:
        yield torch.full_like(tensor, float("nan"))
    elif tensor.dtype in (E4M3, torch.int8, torch.int32):
        yield tensor.float()


def is_noticed(method, part, tensor, value):
    """False where a matrix says itself how large it is: only the model's class knows that it is wrong."""
    if part in OPTIONAL:
        return False
    if part != "weight" or value is None or value.dtype != tensor.dtype or method not in ONE_A_VALUE:
        return True
    return method in ONE_A_ROW and value.shape[0] != tensor.shape[0]


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("impl", ["native", "transformers"])
@pytest.mark.parametrize("method", ONE_A_VALUE)
def test_a_matrix_of_another_width_is_an_error_where_the_model_knows_its_own(method, impl, make):
    folder, tensors = make(method)
    name = f"{MODULE}.weight"
    spoilt_file = tensors | {name: tensors[name][:, :32].contiguous()}
    if method == "fp8":  # its scales fit, too
        spoilt_file[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"][:, :1].contiguous()
    save_file(spoilt_file, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)down_proj\.weight.*model\.safetensors"):
        LLM(model=str(folder), model_impl=impl, skip_tokenizer_init=True, num_blocks=8)


@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_whole_numbers_without_a_method_are_no_weights(impl, make):
    folder, tensors = make("w8a8")
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale")}
    save_file(plain, folder / "model.safetensors")
    file = folder / "config.json"
    before = file.read_text()
    config = json.loads(before)
    del config["quantization_config"]
    file.write_text(json.dumps(config))
    try:
        with pytest.raises(CheckpointError, match=r"_proj\.weight.*whole numbers"):
            LLM(model=str(folder), model_impl=impl, skip_tokenizer_init=True, num_blocks=8)
    finally:
        file.write_text(before)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_that_was_cut_off_is_an_error_that_names_it(method, make):
    folder, tensors = make(method)
    save_file(tensors, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    for size in (len(whole) - 100, len(whole) // 2, 20):
        (folder / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read(folder)


@contextmanager
def stating(folder, **entries):
    """Write other entries into the checkpoint's quantization_config for a while."""
    file = folder / "config.json"
    before = file.read_text()
    config = json.loads(before)
    config["quantization_config"] |= entries
    file.write_text(json.dumps(config))
    try:
        yield
    finally:
        file.write_text(before)


def weights_of(**more):
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": more}}}


LIES = [
    ("awq", {"bits": 3}, "3 bits"),
    ("awq", {"bits": "four"}, "four bits"),
    ("awq", {"group_size": 64}, "scales"),
    ("awq", {"version": "gemv"}, r"qzeros|scales"),
    ("awq", {"version": "gemv_fast"}, "qweight"),
    ("gptq", {"bits": 3}, "3 bits"),
    ("gptq", {"group_size": 64}, "scales"),
    ("gptq", {"checkpoint_format": "gptq_v2"}, "checkpoint_format"),
    ("gptq", {"checkpoint_format": "marlin"}, "marlin"),
    ("int4", weights_of(num_bits=3, group_size=32), "3 bits"),
    ("int4", weights_of(num_bits=8, group_size=32), "weight_packed"),
    ("int8", weights_of(num_bits=4, group_size=32), "weight_packed"),
    ("int8", weights_of(num_bits=8, group_size=64), "weight_scale"),
    ("fp8", {"weight_block_size": [64, 64]}, "weight_scale_inv"),
    ("fp8", {"weight_block_size": None}, "weight_scale_inv"),
    ("fp8", {"weight_block_size": [0, 64]}, "weight_block_size"),
    ("w8a8", {"format": "pack-quantized"}, "weight_packed"),
    ("w8a8-fp8", weights_of(num_bits=8, type="int", strategy="channel"), "int8"),
]


@pytest.mark.parametrize(("method", "entries", "named"), LIES, ids=str)
def test_a_config_that_does_not_say_what_the_file_holds_is_an_error(method, entries, named, make):
    folder, tensors = make(method)
    save_file(tensors, folder / "model.safetensors")
    with stating(folder, **entries), pytest.raises((CheckpointError, ConfigError), match=named):
        read(folder)


@pytest.mark.parametrize("method", METHODS)
def test_an_entry_that_nobody_knows_and_empty_lists_change_nothing(method, make):
    folder, tensors = make(method)
    save_file(tensors, folder / "model.safetensors")
    wanted = read(folder)
    empty = {"modules_to_not_convert": [], "llm_int8_skip_modules": [], "dynamic": {}, "of_tomorrow": {"a": 1}}
    with stating(folder, **empty):
        found = read(folder)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(as_floats(found[name]), as_floats(wanted[name])) for name in wanted)


def as_floats(weight):
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


@pytest.mark.parametrize("method", ["awq", "gptq", "int4"])
@pytest.mark.parametrize("size", ["128", 0, -5, 48, []])
def test_a_group_size_that_is_none_or_does_not_fit_is_an_error(method, size, make):
    folder, tensors = make(method)
    save_file(tensors, folder / "model.safetensors")
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    (stated["config_groups"]["group_0"]["weights"] if method == "int4" else stated)["group_size"] = size
    with stating(folder, **stated), pytest.raises((CheckpointError, ConfigError), match="group"):
        read(folder)
