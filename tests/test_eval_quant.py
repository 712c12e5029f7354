"""eval-quant compares two models as they are served: equal ones are equal, and a quantized one is smaller and near."""

import json

import pytest

from core.cli import run
from core.eval_quant import eval_quant
from core.eval_quant_report import plot, report_json, report_text
from core.plugins import PluginHost
from core.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer whose words are letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    where = tiny_checkpoint("llama", tmp_path_factory.mktemp("eval"))
    letters = Tokenizer(models.WordLevel({chr(code): code - 32 for code in range(32, 120)}, unk_token=" "))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token=" ").save_pretrained(where)
    return where


def compared(folder, **options):
    return eval_quant(str(folder), None, host=PluginHost.load(), samples=2, sample_length=48, **options)


def test_a_model_under_int8_is_near_itself_and_smaller(folder):
    report = compared(folder, quantization="int8", dtype="float32")
    assert report.tokens == 2 * 47
    assert 0 < report.kl_mean < 1e-2
    assert report.top1_agreement > 0.9
    assert abs(report.perplexity_ratio - 1) < 0.02
    assert report.quantized.memory_bytes < 0.7 * report.floats.memory_bytes
    assert report.quantized.quantization == "int8"
    assert "perplexity" in report_text(report)
    assert "kl" not in json.loads(json.dumps(report_json(report)))


def test_coarser_steps_cost_more(folder):
    assert compared(folder, quantization="int4").kl_mean > 3 * compared(folder, quantization="int8").kl_mean


def test_the_plot_is_a_picture(folder, tmp_path):
    pytest.importorskip("matplotlib")
    plot(compared(folder, quantization="int8"), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_alone_is_nothing_to_compare(folder, capsys):
    assert run(["eval-quant", str(folder)]) == 2
    assert "Give either QUANTIZED or --quantization" in capsys.readouterr().err
