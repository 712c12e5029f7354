"""AWQ checkpoints made here: scales are folded away exactly, they help, and what is written is what is served."""

import pytest
import torch
from torch import nn

from core.contracts import QuantizeSettings
from core.errors import ConfigError
from core.plain_module import plain_module
from core.plugins import PluginHost
from core.quantize.calibration import calibration_text, measuring_text
from core.quantize.layer import DecoderLayer
from core.quantize.march import March
from core.quantize.run import QuantizeJob, quantize
from core.testing import assert_matches_dequantized, tiny_checkpoint
from core_quant_awq.absorb import apply_scale, find_absorber
from core_quant_awq.packing import rows_of_gemm, words_of_rows
from core_quant_awq.quantizer import AwqQuantizer
from core_quant_awq.rounding import Rounding, codes_with_feedback
from core_quant_awq.search import best_clip, best_scale, clip_groups

SETTINGS = QuantizeSettings(group_size=16)
SAMPLES = [[3 + (7 * i + 5 * n + i * i) % 90 for i in range(24)] for n in range(3)]


def loaded(folder):
    host = PluginHost.load()
    from core.config import EngineConfig

    return plain_module(host.open_checkpoint(str(folder), EngineConfig(model=str(folder))), torch.float32)


def first_layer(model):
    layers = model.model.layers
    march = iter(March(model, layers, SAMPLES, set()))
    index, calls = next(march)
    found = {name: module for name, module in layers[index].named_modules() if isinstance(module, nn.Linear)}
    return march, DecoderLayer("0", layers[index], found, calls, model.config)


def absorbers(model):
    march, layer = first_layer(model)
    with torch.no_grad():
        found = {}
        for group in layer.input_groups():
            absorber = find_absorber(layer, group)
            found[tuple(group.names)] = absorber.name if absorber else None
    march.close()
    return found


LLAMA = {
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): "input_layernorm",
    ("self_attn.o_proj",): "self_attn.v_proj",
    ("mlp.gate_proj", "mlp.up_proj"): "post_attention_layernorm",
    ("mlp.down_proj",): "mlp.up_proj",
}
GEMMA3 = LLAMA | {("mlp.gate_proj", "mlp.up_proj"): "pre_feedforward_layernorm"}
PHI3 = {
    ("self_attn.qkv_proj",): "input_layernorm",
    ("self_attn.o_proj",): "self_attn.qkv_proj",
    ("mlp.gate_up_proj",): "post_attention_layernorm",
    ("mlp.down_proj",): "mlp.gate_up_proj",
}


@pytest.mark.parametrize(("kind", "wanted"), [("llama", LLAMA), ("gemma3_text", GEMMA3), ("phi3", PHI3)])
def test_what_absorbs_a_scale_is_found_without_knowing_the_architecture(kind, wanted, tmp_path):
    assert absorbers(loaded(tiny_checkpoint(kind, tmp_path))) == wanted


def test_a_nonlinear_way_absorbs_nothing(tmp_path):
    found = absorbers(loaded(tiny_checkpoint("starcoder2", tmp_path)))  # GELU between its two linears, no gate
    assert found[("mlp.c_proj",)] is None


def test_folding_a_scale_leaves_the_layer_as_it_was(tmp_path):
    march, layer = first_layer(loaded(tiny_checkpoint("llama", tmp_path)))
    with torch.no_grad():
        before = layer.calls[0].run(layer.module)
        for group in layer.input_groups():
            absorber = find_absorber(layer, group)
            scale = 0.3 + torch.rand(absorber.free)
            apply_scale([layer.linears[name] for name in group.names], absorber, scale)
        torch.testing.assert_close(layer.calls[0].run(layer.module), before, rtol=1e-4, atol=1e-5)
    march.close()


def test_parameters_that_stand_elsewhere_too_absorb_nothing(tmp_path):
    march, layer = first_layer(loaded(tiny_checkpoint("llama", tmp_path)))
    shared = frozenset(id(parameter) for parameter in layer.module.parameters())
    tied = DecoderLayer("0", layer.module, layer.linears, layer.calls, layer.config, shared)
    with torch.no_grad():
        assert all(find_absorber(tied, group) is None for group in tied.input_groups())
    march.close()


def error_of(weight, rounded, gram):
    return float((((rounded - weight) @ gram) * (rounded - weight)).sum())


def test_scales_and_clips_lessen_the_error_of_the_outputs():
    torch.manual_seed(0)
    x = torch.randn(512, 64) * torch.logspace(-1.5, 1, 64)[torch.randperm(64)]  # some inputs are far larger
    weight, gram, rounding = torch.randn(96, 64), x.T @ x / len(x), Rounding(16)

    def same(values):
        return values

    scale = best_scale([weight], gram, x.abs().mean(0), same, same, rounding)
    scaled = rounding(weight * scale) / scale
    assert error_of(weight, scaled, gram) < 0.5 * error_of(weight, rounding(weight), gram)
    clipped = best_clip(weight, torch.eye(64), 16, lambda w, share: rounding(clip_groups(w, share, 16)))
    assert error_of(weight, rounding(clipped), torch.eye(64)) < error_of(weight, rounding(weight), torch.eye(64))


def test_rounding_makes_good_what_it_costs_and_keeps_scales_and_zeros():
    torch.manual_seed(0)
    x = torch.randn(512, 64) @ torch.randn(64, 64)  # inputs that go together
    weight, gram, rounding = torch.randn(96, 64), x.T @ x / len(x), Rounding(16)
    nearest, scales, zeros = rounding.codes(weight)
    codes = codes_with_feedback(weight, gram, scales, zeros)

    def floats(codes):
        return ((codes.float().unflatten(1, (-1, 16)) - zeros.unsqueeze(-1)) * scales.float().unsqueeze(-1)).flatten(1)

    assert error_of(weight, floats(codes), gram) < 0.8 * error_of(weight, floats(nearest), gram)


def test_inputs_that_never_come_are_rounded_to_something_and_change_nothing():
    gram = torch.diag(torch.cat([torch.ones(16), torch.zeros(16)]))
    weight = torch.randn(8, 32)
    codes = codes_with_feedback(weight, gram, *Rounding(16).codes(weight)[1:])
    assert torch.equal(codes[:, :16], Rounding(16).codes(weight)[0][:, :16].to(torch.uint8))


def test_packing_is_undone_by_reading():
    codes = torch.randint(0, 16, (5, 24))
    assert torch.equal(rows_of_gemm(words_of_rows(codes)).long(), codes)


@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_what_is_made_is_served_like_its_floats(impl, tmp_path, monkeypatch):
    source = tiny_checkpoint("llama", tmp_path / "source")
    monkeypatch.setattr("core.quantize.run._samples", lambda *args: SAMPLES)
    report = quantize(QuantizeJob(str(source), "awq", tmp_path / "out", SETTINGS), PluginHost.load())
    assert report.quantized == 28
    assert report.in_floats == ("lm_head",)
    assert_matches_dequantized(tmp_path / "out", impl)


def test_settings_that_awq_has_no_use_for_are_refused():
    with pytest.raises(ConfigError, match="awq has zero points"):
        AwqQuantizer(QuantizeSettings(symmetric=True))


def test_the_shipped_text_measures_on_another_half_than_it_calibrates_on():
    one, other = calibration_text(None), measuring_text(None)
    assert len(one.split()) > 1500
    assert len(other.split()) > 1500
    assert one not in other
    assert other not in one
