"""`core-serve bench` as it is called: real engines, a real server, the real openai client."""

import json
import math
import sys

import pytest

from core.bench.numbers import fit
from core.bench.scaling import VOCAB, Shape
from core.bench.server import running_server
from core.cli import run
from core.config import EngineConfig


def bench(*argv, tmp_path):
    """Run a command line that must succeed; return its JSON."""
    file = tmp_path / "report.json"
    assert run(["bench", *map(str, argv), "--json", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.fixture
def tiny(folder):
    return "--model-path", str(folder), "--skip-tokenizer-init"


def check_subject(report):
    subject = report["subject"]
    assert subject["ceilings"]["gflops"] > 0
    assert min(subject["ceilings"]["reads"].values()) > 0
    assert subject["costs"]["body_flops"] > 0
    assert subject["threads"] >= 1


# ------------------------------------------------------------------------------------------------ throughput


def test_throughput_reports_every_number_at_a_time(tiny, tmp_path, capsys):
    sizes = "--concurrency", "1,3", "--input-len", 20, "--output-len", 5, "--rounds", 2
    report = bench("throughput", *tiny, *sizes, tmp_path=tmp_path)
    check_subject(report)
    assert [row["concurrency"] for row in report["rows"]] == [1, 3]
    for row in report["rows"]:
        assert all(row[name] > 0 for name in ("output_tok_s", "decode_tok_s", "prefill_tok_s", "itl_p50_s"))
        assert row["ttft_p50_s"] <= row["ttft_p99_s"]
        assert 0 < row["decode_share"] < 1
        assert 0 < row["prefill_share"] < 1
    assert report["profiles"] == {}
    out = capsys.readouterr().out
    for words in ("GFLOP/s", "GB/s", "of bound", "20 tokens in, 5 out", "a step of one token reads"):
        assert words in out


def test_throughput_with_a_profile_shows_decode_and_prefill(tiny, tmp_path, capsys):
    sizes = "--concurrency", 2, "--input-len", 20, "--output-len", 5, "--rounds", 1, "--profile"
    report = bench("throughput", *tiny, *sizes, tmp_path=tmp_path)
    assert set(report["profiles"]) == {"prefill, 2 at a time", "decode, 2 at a time"}
    decode = report["profiles"]["decode, 2 at a time"]
    assert decode["steps"] == 4
    assert decode["bounds"]["linears"] > 0
    out = capsys.readouterr().out
    for words in ("Where the time of a decode step goes", "linears: of the bound", "The profile itself takes"):
        assert words in out


def test_throughput_reads_its_prompts_from_a_text(speaking, tmp_path):
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog " * 4)
    sizes = "--concurrency", 2, "--input-len", 16, "--output-len", 3, "--rounds", 1
    report = bench("throughput", "--model-path", speaking, *sizes, "--text", tmp_path / "text", tmp_path=tmp_path)
    assert report["rows"][0]["output_tok_s"] > 0


def test_more_at_a_time_than_the_engine_takes_by_default_is_run_at_once(tiny, tmp_path):
    sizes = "--concurrency", 70, "--input-len", 4, "--output-len", 3, "--rounds", 1, "--profile"
    report = bench("throughput", *tiny, *sizes, tmp_path=tmp_path)
    assert report["profiles"]["decode, 70 at a time"]["steps"] == 2


def test_requests_that_are_too_long_for_the_model_are_refused(tiny, capsys):
    assert run(["bench", "throughput", *tiny, "--input-len", "500", "--output-len", "100"]) == 1
    assert "500 tokens in and 100 out are longer than this model's 512" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "1,,2", "0", "many", "1;2"])
def test_what_is_no_list_of_numbers_is_refused(tiny, text, capsys):
    assert run(["bench", "throughput", *tiny, "--concurrency", text]) == 2
    assert "--concurrency" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ latency


def test_latency_sweeps_context_and_batch_and_fits_lines(tiny, tmp_path, capsys):
    sweep = "--contexts", "64,128,400,1000", "--batches", "1,2,5", "--steps", 3
    report = bench("latency", *tiny, *sweep, tmp_path=tmp_path)
    check_subject(report)
    assert [(row["batch"], row["context"]) for row in report["by_context"]] == [(1, 64), (1, 128), (1, 400)]
    assert [(row["batch"], row["context"]) for row in report["by_batch"]] == [(1, 64), (2, 64), (5, 64)]
    assert report["left_out"] == ["A context of 1000 is longer than the model's 512."]
    steps = [row["step_s"] for row in report["by_batch"]]
    assert report["batch_line"]["slope"] == pytest.approx(fit([1, 2, 5], steps).slope)
    bounds = [row["bound_s"] for row in report["by_context"]]
    assert bounds == sorted(bounds)
    out = capsys.readouterr().out
    assert "ms per 1,000 tokens of context" in out
    assert "Left out: A context of 1000" in out


def test_latency_leaves_out_what_the_memory_does_not_hold(tiny, tmp_path):
    sweep = "--contexts", "64", "--batches", "1,9", "--steps", 2, "--num-blocks", 20
    report = bench("latency", *tiny, *sweep, tmp_path=tmp_path)
    assert [row["batch"] for row in report["by_batch"]] == [1]
    assert report["left_out"] == ["9 requests of 64 tokens need 36 K/V blocks of 20: --kv-cache-memory."]


def test_latency_with_a_profile_shows_the_ends_of_both_sweeps(tiny, tmp_path):
    sweep = "--contexts", "64,200", "--batches", "1,3", "--steps", 2, "--profile"
    report = bench("latency", *tiny, *sweep, tmp_path=tmp_path)
    ends = ("1 at a time, context 64", "1 at a time, context 200", "3 at a time, context 64")
    assert set(report["profiles"]) == {f"decode, {end}" for end in ends}
    assert {profile["steps"] for profile in report["profiles"].values()} == {2}


def test_latency_where_nothing_fits_says_why(tiny, capsys):
    assert run(["bench", "latency", *tiny, "--contexts", "4096", "--batches", "1"]) == 1
    assert "A context of 4096 is longer than the model's 512." in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ scaling


@pytest.mark.parametrize("size", [10e6, 30e6, 100e6, 300e6, 500e6, 1e9])
def test_a_shape_has_about_as_many_weights_as_asked_for(size):
    assert Shape.nearest(int(size)).parameters == pytest.approx(size, rel=0.25)


def test_scaling_measures_models_of_growing_size_and_fits_a_slope(tmp_path, capsys):
    load = "--concurrency", "1,2", "--input-len", 8, "--output-len", 3
    report = bench("scaling", "--sizes", "600k,3M", *load, tmp_path=tmp_path)
    shapes = [Shape.nearest(600_000), Shape.nearest(3_000_000)]
    assert [(row["parameters"], row["concurrency"]) for row in report["rows"]] == [
        (shape.parameters, count) for shape in shapes for count in (1, 2)
    ]
    assert math.isfinite(report["line_1"]["slope"])
    largest = report["subject"]["costs"]
    norms = (2 * shapes[1].heads + 1) * shapes[1].width
    assert largest["body_flops"] + largest["head_flops"] == 2 * shapes[1].parameters
    assert largest["body_bytes"] + largest["head_bytes"] == 4 * (shapes[1].parameters + norms)
    assert largest["head_flops"] == 2 * VOCAB * shapes[1].width
    assert "grow with weights to the power of" in capsys.readouterr().out


def test_scaling_takes_no_model(tiny, capsys):
    assert run(["bench", "scaling", *tiny]) == 2
    assert "leave out --model-path" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ serve


def test_serve_starts_a_server_and_compares_with_the_engine(speaking, tmp_path, capsys):
    load = "--clients", "1,3", "--per-client", 2, "--input-len", 12, "--output-len", 6
    report = bench("serve", "--model-path", speaking, *load, tmp_path=tmp_path)
    check_subject(report)
    assert [(row["clients"], row["requests"], row["failed"]) for row in report["rows"]] == [(1, 2, 0), (3, 6, 0)]
    for row in report["rows"]:
        assert all(row[name] > 0 for name in ("output_tok_s", "offline_tok_s", "ttft_p50_s", "itl_p50_s"))
    assert "of offline" in capsys.readouterr().out


def test_serve_measures_a_server_that_runs_already(server_url, tmp_path, capsys):
    load = "--clients", 2, "--per-client", 2, "--input-len", 12, "--output-len", 4
    report = bench("serve", "--url", f"{server_url}/v1", *load, tmp_path=tmp_path)
    arriving = bench("serve", "--url", server_url, "--request-rate", 50, *load, tmp_path=tmp_path)
    assert report["subject"] is None
    assert report["url"] == server_url
    for found in (report, arriving):
        row = found["rows"][0]
        assert (row["requests"], row["failed"], row["offline_tok_s"]) == (4, 0, None)
    assert "Give --model-path too" in capsys.readouterr().out


def test_serve_says_what_the_server_refuses(server_url, capsys):
    load = "--clients", "1", "--per-client", "1", "--input-len", "500", "--output-len", "100"
    assert run(["bench", "serve", "--url", server_url, *load]) == 1
    assert "longer than this model's 512" in capsys.readouterr().err


def test_serve_needs_text_to_time(tiny, capsys):
    assert run(["bench", "serve", *tiny]) == 1
    assert "a server without a tokenizer streams none" in capsys.readouterr().err


def test_serve_without_the_openai_client_names_the_extra(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert run(["bench", "serve", *tiny]) == 1
    assert "pip install 'core-serve[bench]'" in capsys.readouterr().err


def test_a_server_that_cannot_load_its_model_is_an_error(tmp_path, capfd):
    from core.errors import CoreError

    with pytest.raises(CoreError, match="ended before it was ready"), running_server(EngineConfig(model=str(tmp_path))):
        pass


# ------------------------------------------------------------------------------------------------ plots


COMMANDS = {
    "throughput": ("--concurrency", "1,2", "--input-len", "8", "--output-len", "3", "--rounds", "1"),
    "latency": ("--contexts", "64,128", "--batches", "1,2", "--steps", "2"),
    "scaling": ("--sizes", "600k,1M", "--concurrency", "1", "--input-len", "8", "--output-len", "3"),
    "serve": ("--clients", "1,2", "--per-client", "1", "--input-len", "8", "--output-len", "3"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_report_can_be_drawn(command, speaking, tmp_path):
    pytest.importorskip("matplotlib")
    model = () if command == "scaling" else ("--model-path", str(speaking))
    assert run(["bench", command, *model, *COMMANDS[command], "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_plot_without_matplotlib_names_the_extra_before_anything_runs(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(["bench", command, "--plot", str(tmp_path / "plot.png")]) == 1
    assert "pip install 'core-serve[plot]'" in capsys.readouterr().err
