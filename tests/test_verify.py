"""`verify` finds a model that is right to be right, and says where one that is wrong goes wrong; `explain --probe`."""

import json
from dataclasses import replace

import pytest
import torch

from core.cli import make_cli, run
from core.contracts import Bid, ModelFeatures, Refusal
from core.errors import ConfigError
from core.hookspecs import hookimpl
from core.plugins import PluginHost
from core.spec import ModelSpec
from core.testing import tiny_checkpoint
from core.verify import NO_LAYERS, verify
from core.verify_compare import Comparison, compare_answer
from core.verify_layers import LayerRecorder, decoder_layers
from core.verify_plain import PlainAnswer, PlainText
from core.verify_report import report_text
from core.verify_texts import edge_lengths, random_texts, slices_of
from core_native_llama.config import LlamaConfig
from core_native_llama.load import load

SMALL = {"block_size": 4, "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(tiny_checkpoint("llama", tmp_path_factory.mktemp("llama")))


class ChangedLlama:
    """The native Llama under another name, with a config or a finished model that is not the checkpoint's."""

    CORE_API = (1, 0)

    def __init__(self, config=lambda config: config, model=lambda model: model):
        self.change_config, self.change_model = config, model

    @hookimpl
    def resolve_model_impl(self, spec, options):
        config = self.change_config(LlamaConfig.from_spec(spec))
        return Bid("changed", 200, lambda checkpoint, context: self.change_model(load(config, checkpoint, context)))


class Declining:
    CORE_API = (1, 0)

    @hookimpl
    def resolve_model_impl(self, spec, options):
        return Bid("declining", 200, lambda checkpoint, context: Refusal("it does not feel like it"))


def host_of(**extra):
    return PluginHost.load(extra=extra)


def wrong_theta(config):
    return replace(config, rope={**config.rope, "rope_theta": 50.0})


def damage_layer_2(model):
    with torch.no_grad():
        model.layers[2].mlp_norm.weight.add_(0.5)
    return model


class Opaque:
    """A model whose modules nobody can see."""

    impl_name, features = "opaque", ModelFeatures()

    def __init__(self, model):
        self.vocab_size = model.vocab_size
        self.kv_specs, self.forward, self.release = model.kv_specs, model.forward, model.release


# ------------------------------------------------------------------------------------------------ whole models


def test_a_native_model_that_is_right_passes_with_exit_code_0(llama, capsys):
    assert run(["verify", llama, "--block-size", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert report["impl_name"] == "native_llama"
    assert [layer["name"] for layer in report["layers"]] == [f"model.layers.{index}" for index in range(4)]
    assert report["logits"]["positions"] == sum(report["lengths"])
    assert report["logits"]["top1_agreement"] == 1.0


@pytest.mark.parametrize(("model_type", "impl"), [("gpt2", "transformers/paged"), ("gemma2", "transformers/paged")])
def test_a_model_of_the_fallback_passes(model_type, impl, tmp_path):
    report = verify(tiny_checkpoint(model_type, tmp_path), **SMALL)
    assert report.passed, report.problems
    assert report.impl_name == impl
    assert report.layers_note is None
    assert all(0 <= layer.error < 1e-4 for layer in report.layers)


def test_layers_are_compared_where_requests_are_rows_of_a_batch_too(llama):
    report = verify(llama, model_impl="transformers/rows", **SMALL)
    assert report.passed, report.problems
    assert report.impl_name.startswith("transformers/rows")
    assert report.layers_note is None
    assert all(0 <= layer.error < 1e-4 for layer in report.layers)


def test_a_wrong_rope_exits_with_1_and_names_layer_0(llama, capsys):
    host = host_of(changed=ChangedLlama(config=wrong_theta))
    args = ["verify", llama, "--block-size", "4"]
    assert make_cli().main(args=args, obj=host, standalone_mode=False) == 1
    shown = capsys.readouterr().out
    assert "model.layers.0 is the first layer that departs" in shown
    assert "served by: native_llama" in shown


def test_the_first_layer_that_departs_is_named(llama):
    report = verify(llama, host=host_of(changed=ChangedLlama(model=damage_layer_2)), **SMALL)
    assert not report.passed
    assert report.first_bad_layer.name == "model.layers.2"
    assert report.first_bad_layer.served_name == "layers.2"
    assert report.logits.error > report.logits.allowed


def test_a_model_without_a_list_of_layers_is_compared_by_its_logits(llama):
    report = verify(llama, host=host_of(changed=ChangedLlama(model=Opaque)), **SMALL)
    assert report.passed, report.problems
    assert report.layers == ()
    assert report.layers_note == NO_LAYERS


def test_a_model_that_gives_nan_does_not_pass(llama, capsys):
    def break_norm(model):
        with torch.no_grad():
            model.layers[1].attention_norm.weight.fill_(float("nan"))
        return model

    host = host_of(changed=ChangedLlama(model=break_norm))
    assert make_cli().main(args=["verify", llama, "--json"], obj=host, standalone_mode=False) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["first_bad_layer"] == "model.layers.1"
    assert report["layers"][1]["error"] is None


def test_without_time_nothing_is_compared_which_is_no_pass_and_the_texts_left_out_are_named(llama):
    report = verify(llama, time_limit=1e-9, **SMALL)
    assert report.lengths == ()
    assert report.skipped[0] == 1
    assert report.problems == ["No logits were compared; give more time with --time-limit."]


def test_a_pass_says_which_texts_there_was_no_time_for(llama):
    report = verify(llama, **SMALL)
    assert "plain transformers does. (" in report_text(report)
    assert "no time for texts of 511, 512 tokens" in report_text(replace(report, skipped=(511, 512)))


def test_a_vocabulary_too_large_for_all_positions_is_compared_at_some_of_every_text(llama, monkeypatch):
    monkeypatch.setattr("core.verify_plain.LOGIT_BYTES", 20_000)
    report = verify(llama, **SMALL)
    assert report.passed, report.problems
    assert len(report.lengths) <= report.logits.positions < sum(report.lengths)


def test_a_model_cannot_be_verified_against_something_unknown(llama):
    with pytest.raises(ConfigError, match="against 'transformers', not 'paper'"):
        verify(llama, against="paper")


# ------------------------------------------------------------------------------------------------ texts


def spec(tmp_path, **config):
    return ModelSpec(tmp_path, "hf", {"model_type": "x", **config})


def test_lengths_lie_around_the_edges_of_blocks_windows_and_chunks(tmp_path):
    lengths = edge_lengths(spec(tmp_path, sliding_window=100, attention_chunk_size=40), 16, 1000)
    assert {1, 15, 16, 17, 39, 40, 41, 99, 100, 101} <= set(lengths)
    assert lengths == sorted(set(lengths))


def test_no_text_is_longer_than_the_model_allows(tmp_path):
    assert max(edge_lengths(spec(tmp_path, sliding_window=100), 16, 100)) == 100


def test_a_window_that_is_switched_off_is_no_edge(tmp_path):
    assert 100 not in edge_lengths(spec(tmp_path, sliding_window=100, use_sliding_window=False), 16, 1000)


def test_random_texts_are_the_same_every_time_and_begin_differently():
    texts = random_texts([5, 7], 90)
    assert texts == random_texts([5, 7], 90)
    assert texts[0] != texts[1][:5]


def test_a_short_text_is_used_whole_in_place_of_longer_ones():
    assert slices_of(list(range(10)), [1, 4, 50]) == [[0], [2, 3, 4, 5], list(range(10))]


# ------------------------------------------------------------------------------------------------ parts


def test_the_decoders_list_is_found_although_its_experts_are_more():
    layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
    layers[0].experts = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(5))
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = layers
    assert decoder_layers(model).names == ["model.layers.0", "model.layers.1"]
    assert decoder_layers(model, 3) is None


def test_an_output_that_is_changed_in_place_later_is_recorded_as_it_was():
    layer = torch.nn.Identity()
    recorder = LayerRecorder(["only"], [layer])
    with recorder.recording():
        layer(torch.zeros(1, 3, 2)).add_(1)
    assert torch.equal(recorder.rows(3)[0], torch.zeros(3, 2))


def test_rows_of_a_batch_are_not_taken_for_tokens_of_a_text():
    layer = torch.nn.Identity()
    recorder = LayerRecorder(["only"], [layer])
    with recorder.recording():
        layer(torch.zeros(2, 1, 4))
    assert recorder.rows(2) is None


def test_errors_are_measured_in_the_spread_of_the_plain_values():
    plain = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    text = PlainText([5, 6], torch.arange(2), plain, torch.arange(2), [], torch.zeros(2), [])
    comparison = Comparison([text], [], 1e-3)
    comparison.take(0, 1, plain[1:] + torch.tensor([[0.0, 1.0]]), None)
    found = comparison.logits()
    assert (found.positions, found.position, found.length) == (1, 1, 2)
    assert found.error == pytest.approx(1 / plain[1].std().item())
    assert found.max_difference == 1.0
    assert found.kl_max > 0


def test_equal_infinities_are_no_difference():
    plain = torch.tensor([[1.0, 0.0, float("-inf")]])
    comparison = Comparison([PlainText([5], torch.arange(1), plain, torch.arange(1), [], torch.zeros(1), [])], [], 1e-3)
    comparison.take(0, 0, plain.clone(), None)
    assert comparison.logits().error == comparison.logits().kl_max == 0


@pytest.mark.parametrize(("noise", "allowed"), [(0.0, 0.001), (0.01, 0.32), (9.0, 0.5)])
def test_more_is_allowed_where_rounding_alone_moves_the_plain_model(noise, allowed):
    plain = torch.tensor([[1.0, -1.0]])
    text = PlainText([5], torch.arange(1), plain, torch.arange(1), [], torch.tensor([noise]), [])
    comparison = Comparison([text], [], 1e-3)
    comparison.take(0, 0, plain, None)
    assert comparison.logits().allowed == pytest.approx(allowed)


def test_where_two_answers_part_the_margin_tells_how_sure_plain_was():
    plain = PlainAnswer([1], [2, 0], torch.tensor([[0.0, 0.0, 9.0], [2.0, 1.0, 0.0]]))
    assert compare_answer(plain, [2, 0]).margin is None
    parted = compare_answer(plain, [2, 1])
    assert (parted.equal, parted.margin) == (1, pytest.approx(1.0))


# ------------------------------------------------------------------------------------------------ explain --probe


def test_a_probe_says_who_declined_after_loading_and_who_serves(tmp_path, capsys):
    folder = str(tiny_checkpoint("mpt", tmp_path))
    assert run(["explain", folder, "--probe", "--model-impl", "transformers"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("transformers/")]
    assert lines[0].startswith("transformers/paged: declined: ")
    assert lines[1].startswith("transformers/rows: serves (")


def test_a_probe_that_finds_nobody_exits_with_1(llama, capsys):
    host = host_of(declining=Declining())
    args = ["explain", llama, "--probe", "--json", "--model-impl", "declining"]
    assert make_cli().main(args=args, obj=host, standalone_mode=False) == 1
    [tried] = json.loads(capsys.readouterr().out)["probe"]
    assert (tried["name"], tried["refusal"]) == ("declining", "it does not feel like it")


def test_without_probe_nothing_is_built(llama, capsys):
    assert make_cli().main(args=["explain", llama], obj=host_of(declining=Declining()), standalone_mode=False) == 0
    assert "declining: " not in capsys.readouterr().out
