"""Making quantized checkpoints layer by layer: what each layer is calibrated on, and going on after a stop."""

import json

import pytest
import torch

from core.config import EngineConfig
from core.contracts import QuantizeSettings
from core.errors import ConfigError
from core.plain_module import plain_module
from core.plugins import PluginHost
from core.quantize.layer import DecoderLayer
from core.quantize.march import March
from core.quantize.matrices import find_matrices
from core.quantize.run import QuantizeJob, quantize
from core.testing import assert_matches_dequantized, tiny_checkpoint
from core.weights import HFCheckpoint
from core_quant_awq.quantizer import AwqQuantizer
from core_quant_gptq.quantizer import GptqQuantizer

SAMPLES = [[3 + (7 * i + 5 * n + i * i) % 90 for i in range(24)] for n in range(3)]
SETTINGS = QuantizeSettings(group_size=16)
METHODS = {"awq": AwqQuantizer, "gptq": GptqQuantizer}


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr("core.quantize.run._samples", lambda *args: SAMPLES)
    return tiny_checkpoint("llama", tmp_path / "source")


def float_inputs(folder):
    """What goes into each layer of the float model, of the first sample."""
    found = []
    checkpoint = PluginHost.load().open_checkpoint(str(folder), EngineConfig(model=str(folder)))
    module = plain_module(checkpoint, torch.float32)
    for layer in module.model.layers:
        layer.register_forward_pre_hook(lambda layer, args, kwargs: found.append(args[0].clone()), with_kwargs=True)
    with torch.no_grad():
        module(input_ids=torch.tensor(SAMPLES[:1]), use_cache=False)
    return found


def calibrated_inputs(source, method, output, monkeypatch):
    """What each layer is calibrated on while a checkpoint is made, of the first sample."""
    found = []
    plain = METHODS[method].quantize_layer

    def noting(self, layer):
        found.append(layer.calls[0].args[0].clone())
        return plain(self, layer)

    monkeypatch.setattr(METHODS[method], "quantize_layer", noting)
    quantize(QuantizeJob(str(source), method, output, SETTINGS), PluginHost.load())
    return found


def test_awq_calibrates_every_layer_on_what_the_float_model_puts_out(source, tmp_path, monkeypatch):
    found = calibrated_inputs(source, "awq", tmp_path / "out", monkeypatch)
    for got, wanted in zip(found, float_inputs(source), strict=True):
        torch.testing.assert_close(got, wanted)


def test_gptq_calibrates_every_layer_on_what_the_written_layers_put_out(source, tmp_path, monkeypatch):
    found, floats = calibrated_inputs(source, "gptq", tmp_path / "out", monkeypatch), float_inputs(source)
    torch.testing.assert_close(found[0], floats[0])
    assert all(not torch.allclose(got, wanted, rtol=1e-2) for got, wanted in zip(found[1:], floats[1:], strict=True))


def weights_of(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_cut_off_ends_with_the_bytes_of_one_that_was_not(method, source, tmp_path, monkeypatch):
    whole, cut, host = tmp_path / "whole", tmp_path / "cut", PluginHost.load()
    quantize(QuantizeJob(str(source), method, whole, SETTINGS), host)

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(QuantizeJob(str(source), method, cut, SETTINGS), host, stop)
    assert len(weights_of(cut)) == 2
    quantize(QuantizeJob(str(source), method, cut, SETTINGS), host)
    assert weights_of(cut) == weights_of(whole)


def test_an_unfinished_run_of_other_settings_is_refused(source, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    host, output = PluginHost.load(), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(QuantizeJob(str(source), "awq", output, SETTINGS), host, stop)
    with pytest.raises(ConfigError, match=r"unfinished checkpoint made otherwise \(dtype differ\)"):
        quantize(QuantizeJob(str(source), "awq", output, SETTINGS, dtype="float16"), host)
    quantize(QuantizeJob(str(source), "awq", output, SETTINGS), host)
    assert not (output / "unfinished.json").exists()
    assert json.loads((output / "config.json").read_text())["quantization_config"]["group_size"] == 16


MAKERS = ("awq", "gptq", "int4", "int8", "bnb-nf4", "bnb-int8")


def made_by(method, source, output):
    settings = QuantizeSettings() if method.startswith("bnb") else SETTINGS
    return quantize(QuantizeJob(str(source), method, output, settings), PluginHost.load())


@pytest.fixture
def samples(monkeypatch):
    monkeypatch.setattr("core.quantize.run._samples", lambda *args: SAMPLES)


@pytest.mark.parametrize(("kind", "matrices"), [("gpt2", 4), ("mixtral", 16)])
@pytest.mark.parametrize("method", MAKERS)
def test_conv1ds_and_experts_are_quantized_like_linears_and_served(method, kind, matrices, tmp_path, samples):
    source = tiny_checkpoint(kind, tmp_path / "source", num_hidden_layers=1)
    report = made_by(method, source, tmp_path / "out")
    assert (report.quantized, report.in_floats) == (matrices, ("lm_head",))
    assert_matches_dequantized(tmp_path / "out", "transformers")


def test_experts_are_written_under_the_names_that_files_of_the_model_have(tmp_path, samples):
    made_by("awq", tiny_checkpoint("mixtral", tmp_path / "source", num_hidden_layers=1), tmp_path / "out")
    names = set(HFCheckpoint(tmp_path / "out").tensor_names())
    expert = "model.layers.0.block_sparse_moe.experts.3"
    assert {f"{expert}.{name}.{part}" for name in ("w1", "w2", "w3") for part in ("qweight", "scales")} <= names
    assert not any("gate_up_proj" in name for name in names)


def test_stacks_that_a_file_keeps_whole_stay_in_floats_and_are_named(tmp_path, samples):
    source = tiny_checkpoint("gpt_oss", tmp_path / "source", num_hidden_layers=1)
    report = made_by("int4", source, tmp_path / "out")
    assert "model.layers.0.mlp.experts.gate_up_proj" in report.in_floats


def test_linears_that_no_group_fits_stay_in_floats(tmp_path, samples):
    source = tiny_checkpoint("llama", tmp_path / "source", num_hidden_layers=1, intermediate_size=40)
    report = made_by("int4", source, tmp_path / "out")
    assert report.in_floats == ("model.layers.0.mlp.down_proj", "lm_head")
    assert_matches_dequantized(tmp_path / "out", "native")


def test_a_group_size_that_some_linear_does_not_fit_is_refused_with_what_fits(tmp_path, samples):
    source = tiny_checkpoint("llama", tmp_path / "source", num_hidden_layers=1, intermediate_size=48)
    job = QuantizeJob(str(source), "int4", tmp_path / "out", QuantizeSettings(group_size=32))
    with pytest.raises(ConfigError, match=r"down_proj has 48 inputs. What fits: 16"):
        quantize(job, PluginHost.load())


def test_an_expert_is_calibrated_on_the_tokens_that_are_sent_to_it(tmp_path):
    folder = tiny_checkpoint("mixtral", tmp_path, num_hidden_layers=1)
    checkpoint = PluginHost.load().open_checkpoint(str(folder), EngineConfig(model=str(folder)))
    model = plain_module(checkpoint, torch.float32)
    model.set_experts_implementation("eager")
    block, sent = model.model.layers[0], []
    block.mlp.experts.register_forward_pre_hook(lambda module, args: sent.append(args))
    found = find_matrices(model, "model.layers.0", block)
    march = iter(March(model, [block], SAMPLES[:1], set()))
    _, calls = next(march)
    with torch.no_grad():
        groups = DecoderLayer("model.layers.0", block, found.linears, calls, model.config).input_groups()
    march.close()
    hidden, chosen, _ = sent[0]
    for group in groups:
        if group.names == ["mlp.experts.2.w1", "mlp.experts.2.w3"]:
            x = hidden[(chosen == 2).any(-1)]
            torch.testing.assert_close(group.gram, x.T @ x / len(x))
            return
    raise AssertionError([group.names for group in groups])


def test_a_run_over_experts_that_was_cut_off_ends_with_the_same_bytes(tmp_path, samples):
    source, host = tiny_checkpoint("mixtral", tmp_path / "source", num_hidden_layers=2), PluginHost.load()
    made_by("gptq", source, tmp_path / "whole")

    def stop(done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(QuantizeJob(str(source), "gptq", tmp_path / "cut", SETTINGS), host, stop)
    made_by("gptq", source, tmp_path / "cut")
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
