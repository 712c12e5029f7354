"""Making quantized checkpoints layer by layer: what each layer is calibrated on, and going on after a stop."""

import json

import pytest
import torch

from core.config import EngineConfig
from core.contracts import QuantizeSettings
from core.errors import ConfigError
from core.plain_module import plain_module
from core.plugins import PluginHost
from core.quantize.run import QuantizeJob, quantize
from core.testing import tiny_checkpoint
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
