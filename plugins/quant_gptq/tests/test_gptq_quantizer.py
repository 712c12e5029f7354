"""GPTQ checkpoints made here: better than rounding to nearest for the inputs that were seen, and served as written."""

import pytest
import torch

from core.contracts import QuantizeSettings
from core.plugins import PluginHost
from core.quantize.run import QuantizeJob, quantize
from core.testing import assert_matches_dequantized, tiny_checkpoint
from core_quant_gptq.quantizer import GptqQuantizer

SAMPLES = [[3 + (7 * i + 5 * n + i * i) % 90 for i in range(24)] for n in range(3)]
SETTINGS = {
    "plain": QuantizeSettings(group_size=16),
    "act-order": QuantizeSettings(group_size=16, desc_act=True),
    "asymmetric": QuantizeSettings(group_size=16, symmetric=False, desc_act=True),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_errors_are_carried_to_where_they_cost_less(settings):
    torch.manual_seed(0)
    x = torch.randn(512, 256) @ torch.randn(256, 256) * 0.1  # inputs that depend on each other
    weight, gram = torch.randn(64, 256), x.T @ x / len(x)
    quantizer = GptqQuantizer(settings)

    def loss(parts):
        error = quantizer.restore(parts) - weight
        return float(((error @ gram) * error).sum())

    assert loss(quantizer._packed(weight, gram)) < 0.6 * loss(quantizer._packed(weight, None))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_is_made_is_served_like_its_floats(settings, tmp_path, monkeypatch):
    source = tiny_checkpoint("llama", tmp_path / "source")
    monkeypatch.setattr("core.quantize.run._samples", lambda *args: SAMPLES)
    report = quantize(QuantizeJob(str(source), "gptq", tmp_path / "out", settings), PluginHost.load())
    assert report.quantized == 28
    assert_matches_dequantized(tmp_path / "out", "native")


def test_columns_that_no_input_reaches_become_zero_weights_that_do_no_harm():
    x = torch.randn(64, 32)
    x[:, 5] = 0
    quantizer = GptqQuantizer(QuantizeSettings(group_size=16))
    found = quantizer.restore(quantizer._packed(torch.randn(16, 32), x.T @ x / 64))
    assert bool(found.isfinite().all())
    assert torch.equal(found[:, 5], torch.zeros(16))
