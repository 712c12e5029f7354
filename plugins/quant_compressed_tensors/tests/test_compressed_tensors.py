"""llm-compressor's checkpoints: the same floats as its own library reads, bit for bit; what does not fit is named."""

import json
import logging

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from core.config import EngineConfig
from core.contracts import QuantizeSettings
from core.errors import CheckpointError, ConfigError
from core.layers import QuantizedTensor
from core.plugins import PluginHost
from core.quantize.run import QuantizeJob, quantize
from core.testing import assert_matches_dequantized, tiny_checkpoint

OUT, IN = 48, 128


def int_args(bits, strategy="group", symmetric=True, group_size=32):
    size = {"group_size": group_size} if strategy == "group" else {}
    return QuantizationArgs(num_bits=bits, type="int", strategy=strategy, symmetric=symmetric, **size)


FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
KINDS = {
    "w4a16": ("pack-quantized", int_args(4)),
    "w4a16-asymmetric": ("pack-quantized", int_args(4, symmetric=False)),
    "w4a16-channel": ("pack-quantized", int_args(4, "channel")),
    "w4a16-channel-asymmetric": ("pack-quantized", int_args(4, "channel", symmetric=False)),
    "w8a16": ("pack-quantized", int_args(8)),
    "w8a16-asymmetric": ("pack-quantized", int_args(8, symmetric=False)),
    "w4a16-tensor-asymmetric": ("pack-quantized", int_args(4, "tensor", symmetric=False)),
    "w8a16-channel-asymmetric": ("pack-quantized", int_args(8, "channel", symmetric=False)),
    "w8a16-channel": ("pack-quantized", int_args(8, "channel")),
    "w8a8": ("int-quantized", int_args(8, "channel")),
    "w8a8-asymmetric": ("int-quantized", int_args(8, "channel", symmetric=False)),
    "w8a8-tensor": ("int-quantized", int_args(8, "tensor")),
    "fp8": ("float-quantized", QuantizationArgs(**FLOAT, strategy="channel")),
    "fp8-tensor": ("float-quantized", QuantizationArgs(**FLOAT, strategy="tensor")),
    "fp8-block": ("float-quantized", QuantizationArgs(**FLOAT, strategy="block", block_structure=[16, 64])),
    "fp8-naive": ("naive-quantized", QuantizationArgs(**FLOAT, strategy="channel")),
}


def qparams(weight, args):
    """Scales and zeros of the shapes that the library has, none of them exact."""
    shape = {
        "group": (OUT, IN // 32),
        "channel": (OUT, 1),
        "tensor": (1,),
        "block": (OUT // 16, IN // 64),
    }[args.strategy]
    top = 448 if args.type == "float" else 2 ** (args.num_bits - 1)
    found = {"weight_scale": (weight.abs().max() / top * (0.5 + torch.rand(shape))).to(weight.dtype)}
    if not args.symmetric:
        found["weight_zero_point"] = torch.randint(-3, 4, shape).to(torch.int8)
    return found


def compressed(args, form, dtype, seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(OUT, IN, dtype=dtype)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    library = BaseCompressor.get_value_from_registry(
        {"int-quantized": "naive-quantized", "float-quantized": "naive-quantized"}.get(form, form)
    )
    parts = library.compress({"weight": weight, **qparams(weight, args)}, scheme)
    return parts, library.decompress(parts, scheme)["weight"]


def group(args, form=None, targets=("Linear",), **more):
    entry = {"targets": list(targets), "weights": json.loads(args.model_dump_json()), **more}
    return entry | ({"format": form} if form else {})


def written(folder, tensors, form, groups, **more):
    folder.mkdir(exist_ok=True)
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, **more}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def read(folder, dtype=torch.float32):
    options = EngineConfig(model=str(folder))
    host = PluginHost.load()
    checkpoint = host.open_checkpoint(str(folder), options)
    return dict(host.quant_method(checkpoint.spec, options).tensors(checkpoint, dtype))


def under(module, parts):
    return {f"{module}.{name}": tensor for name, tensor in parts.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_equal_the_librarys_bit_for_bit(kind, dtype, tmp_path):
    form, args = KINDS[kind]
    parts, floats = compressed(args, form, dtype)
    found = read(written(tmp_path / "m", under("a.b", parts), form, {"group_0": group(args)}), dtype)
    assert set(found) == {"a.b.weight"}
    weight = found["a.b.weight"]
    assert isinstance(weight, QuantizedTensor)
    assert weight.dtype == floats.dtype == dtype
    assert torch.equal(weight.dequantize(), floats)


def test_columns_of_groups_that_are_out_of_order_come_back_in_theirs(tmp_path):
    args = int_args(4)
    parts, _ = compressed(args, "pack-quantized", torch.float32)
    g_idx = torch.randperm(IN) // 32
    found = read(
        written(tmp_path / "m", under("a", parts | {"weight_g_idx": g_idx.int()}), "pack-quantized", {"g": group(args)})
    )
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes = unpack_from_int32(parts["weight_packed"], 4, torch.Size([OUT, IN]))
    assert torch.equal(found["a.weight"].dequantize(), codes * parts["weight_scale"][:, g_idx])


def test_zeros_of_older_versions_are_not_packed(tmp_path):
    args = int_args(4, symmetric=False)
    parts, floats = compressed(args, "pack-quantized", torch.float32)
    torch.manual_seed(0)
    zeros = qparams(torch.randn(OUT, IN), args)["weight_zero_point"]
    tensors = under("a", parts | {"weight_zero_point": zeros})
    found = read(written(tmp_path / "m", tensors, "pack-quantized", {"g": group(args)}))
    assert torch.equal(found["a.weight"].dequantize(), floats)


@pytest.mark.parametrize(("bits", "width"), [(4, 44), (8, 30)])
def test_rows_that_end_within_a_word_are_read_to_their_end(bits, width, tmp_path):
    args = int_args(bits, "channel", symmetric=False)
    weight, scheme = torch.randn(37, width), QuantizationScheme(targets=["Linear"], weights=args)
    zeros = torch.randint(-3, 4, (37, 1)).to(torch.int8)
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    given = {"weight": weight, "weight_scale": torch.rand(37, 1) + 0.1, "weight_zero_point": zeros}
    parts = library.compress(given, scheme)
    found = read(written(tmp_path / "m", under("a", parts), "pack-quantized", {"g": group(args)}))
    assert torch.equal(found["a.weight"].dequantize(), library.decompress(parts, scheme)["weight"])


def test_each_module_has_the_group_that_names_it_and_ignored_ones_are_floats(tmp_path):
    four, _ = compressed(int_args(4), "pack-quantized", torch.float32)
    eight, _ = compressed(int_args(8, "channel"), "int-quantized", torch.float32)
    head = torch.randn(8, IN)
    tensors = under("l.0.up", four) | under("l.0.down", eight) | {"head.weight": head, "l.0.up.bias": torch.ones(OUT)}
    groups = {
        "group_0": group(int_args(4), "pack-quantized"),
        "group_1": group(int_args(8, "channel"), "int-quantized", targets=["re:.*down$"]),
    }
    found = read(written(tmp_path / "m", tensors, "mixed-precision", groups, ignore=["head"]))
    assert set(found) == {"l.0.up.weight", "l.0.down.weight", "head.weight", "l.0.up.bias"}
    assert (found["l.0.up.weight"].packing, found["l.0.down.weight"].packing) == ("affine4", "affine8")
    assert torch.equal(found["head.weight"], head)


def test_activations_that_were_to_be_rounded_stay_in_floats_and_the_log_says_so(tmp_path, caplog):
    args = int_args(8, "channel")
    parts, floats = compressed(args, "int-quantized", torch.float32)
    inputs = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
    tensors = under("a", parts | {"input_scale": torch.ones(1)})
    folder = written(tmp_path / "m", tensors, "int-quantized", {"g": group(args, input_activations=inputs)})
    with caplog.at_level(logging.WARNING, "core_serve.quant_compressed_tensors"):
        found = read(folder)
    assert "8 bit activations; they stay in floats" in caplog.text
    assert set(found) == {"a.weight"}
    assert torch.equal(found["a.weight"].dequantize(), floats)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda parts: parts.pop("weight_scale"), r"'a\.weight_scale' is missing. .*model\.safetensors needs it"),
        (
            lambda parts: parts.update(weight_scale=torch.ones(OUT, 3)),
            r"'a\.weight_scale' of .*model\.safetensors has shape \[48, 3\]; right is \[48, 4\]",
        ),
        (
            lambda parts: parts.update(weight_packed=parts["weight_packed"][:, 1:]),
            r"'a\.weight_packed' of .*right is torch.int32 \[48, 16\]",
        ),
        (
            lambda parts: parts.update(weight_g_idx=torch.zeros(IN)),
            r"'a\.weight_g_idx' .*does not give each of 4 groups 32",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_file_and_tensor(spoil, error, tmp_path):
    parts, _ = compressed(int_args(4), "pack-quantized", torch.float32)
    spoil(parts)
    with pytest.raises(CheckpointError, match=error):
        read(written(tmp_path / "m", under("a", parts), "pack-quantized", {"g": group(int_args(4))}))


def test_a_truncated_file_is_an_error_that_names_it_and_the_tensor(tmp_path):
    parts, _ = compressed(int_args(4), "pack-quantized", torch.float32)
    folder = written(tmp_path / "m", under("a", parts), "pack-quantized", {"g": group(int_args(4))})
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short .* before tensor 'a\.\w+' does"):
        read(folder)


def test_a_quantized_weight_without_a_scale_is_an_error(tmp_path):
    tensors = {"a.weight": torch.zeros(4, 4, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=r"'a\.weight' of .* is torch.int8 and has no weight_scale"):
        read(written(tmp_path / "m", tensors, "int-quantized", {"g": group(int_args(8, "channel"))}))


@pytest.mark.parametrize(
    ("form", "change", "error"),
    [
        ("nvfp4-pack-quantized", {}, "in format 'nvfp4-pack-quantized'; this plugin reads pack-quantized"),
        ("pack-quantized", {"quantization_status": "frozen"}, "quantization_status 'frozen'"),
        ("pack-quantized", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
    ],
)
def test_what_the_plugin_does_not_read_is_refused(form, change, error, tmp_path):
    with pytest.raises(ConfigError, match=error):
        read(written(tmp_path / "m", {"a": torch.zeros(1)}, form, {"g": group(int_args(4))}, **change))


# ------------------------------------------------------------------------------------------------ made here


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("int4", QuantizeSettings(group_size=16)),
        ("int4", QuantizeSettings(group_size=16, symmetric=False)),
        ("int8", QuantizeSettings(group_size=-1)),
    ],
    ids=["int4", "int4-asymmetric", "int8-channel"],
)
def test_what_quantize_makes_is_loaded_by_transformers_and_served_here(method, settings, source, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    report = quantize(QuantizeJob(str(source), method, out, settings), PluginHost.load())
    assert report.quantized > 0
    for impl in ("native", "transformers"):
        assert_matches_dequantized(out, impl)
    if settings.symmetric is False:
        return  # compressed-tensors 0.20 prepares modules for zero points that are not packed
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    own = {name: weight for name, weight in read(out).items() if isinstance(weight, QuantizedTensor)}
    assert len(own) == report.quantized
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        theirs = model(ids).logits
        from core.plain_module import plain_module

        host, options = PluginHost.load(), EngineConfig(model=str(out))
        checkpoint = host.open_checkpoint(str(out), options)
        ours = plain_module(checkpoint, torch.float32, method=host.quant_method(checkpoint.spec, options))(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_int4_rounds_better_than_the_plain_range(source):
    from core_quant_compressed_tensors.quantizer import IntQuantizer

    quantizer = IntQuantizer(4, QuantizeSettings(group_size=16))
    weight = torch.randn(64, 128)
    plain = weight.unflatten(1, (-1, 32))
    scale = plain.abs().amax(-1, keepdim=True) / 7.5
    rounded = ((plain / scale).round().clamp(-8, 7) * scale).flatten(1)
    found = quantizer.restore(quantizer.pack(weight))
    assert (found - weight).square().sum() < 0.95 * (rounded - weight).square().sum()


def test_a_group_size_that_divides_no_row_is_refused(source, tmp_path):
    job = QuantizeJob(str(source), "int4", tmp_path / "out", QuantizeSettings(group_size=24))
    with pytest.raises(ConfigError, match="Group size 24 does not fit int4 here"):
        quantize(job, PluginHost.load())


def test_a_run_that_was_cut_off_goes_on_and_ends_the_same(source, tmp_path):
    class CutOff(Exception):
        pass

    def stop(done, total):
        if done == 1:
            raise CutOff

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = QuantizeSettings(group_size=16)
    quantize(QuantizeJob(str(source), "int4", whole, settings), PluginHost.load())
    with pytest.raises(CutOff):
        quantize(QuantizeJob(str(source), "int4", parts, settings), PluginHost.load(), stop)
    with pytest.raises(ConfigError, match=r"unfinished checkpoint made otherwise \(group_size differ\)"):
        quantize(QuantizeJob(str(source), "int4", parts, QuantizeSettings(group_size=-1)), PluginHost.load())
    seen = []
    quantize(
        QuantizeJob(str(source), "int4", parts, settings), PluginHost.load(), lambda done, total: seen.append(done)
    )
    assert seen[0] == 1
    assert sorted(file.name for file in whole.iterdir()) == sorted(file.name for file in parts.iterdir())
    for file in whole.glob("*.safetensors"):
        one, other = load_file(file), load_file(parts / file.name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_tensor_is_in_one_shard_that_of_its_layer(tmp_path):
    deep = tiny_checkpoint("llama", tmp_path / "deep", num_hidden_layers=12)
    quantize(QuantizeJob(str(deep), "int4", tmp_path / "out", QuantizeSettings(group_size=16)), PluginHost.load())
    names = [name for file in sorted((tmp_path / "out").glob("*.safetensors")) for name in load_file(file)]
    assert len(names) == len(set(names))
    assert not any(name.endswith("_proj.weight") for name in names)
