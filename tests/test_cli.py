"""The command line: what it parses, what it hands on, how it fails, and answers of a tiny real model."""

import io
import json
import os
import signal
import subprocess
import sys

import click
import pytest

from core.cli import disabled_in, make_cli, run
from core.commands.options import byte_size, make_config
from core.commands.serve import SERVER_FIELDS
from core.config import EngineConfig
from core.plugins import PluginHost
from core.server.options import ServerOptions

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return str(tmp_path)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A random Llama with a tokenizer of words and a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY, bos_token_id=None, eos_token_id=1)).save_pretrained(folder)
    words = {"<unk>": 0, "<eos>": 1, **{f"w{index}": index for index in range(2, 32)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.chat_template = "{% for message in messages %}{{ message.content + ' w9 ' }}{% endfor %}"
    fast.save_pretrained(folder)
    return str(folder)


def parsed(*argv):
    """Return (EngineConfig, ServerOptions) of a serving command line."""
    cli = make_cli()
    given = dict(cli.make_context("core-serve", list(argv)).params)
    server = ServerOptions(**{name: given.pop(name) for name in SERVER_FIELDS})
    return make_config(given, PluginHost.load()), server


# ------------------------------------------------------------------------------------------------ options


def test_without_options_the_defaults_are_those_of_the_configs():
    assert parsed() == (EngineConfig(), ServerOptions())


@pytest.mark.parametrize(
    ("sglang", "vllm", "field", "value"),
    [
        ("--model-path", "--model", "model", "/m"),
        ("--context-length", "--max-model-len", "max_model_len", 128),
        ("--max-running-requests", "--max-num-seqs", "max_num_seqs", 3),
        ("--chunked-prefill-size", "--max-num-batched-tokens", "max_num_batched_tokens", 99),
        ("--page-size", "--block-size", "block_size", 32),
        ("--random-seed", "--seed", "seed", 5),
        ("--tokenizer-path", "--tokenizer", "tokenizer", "/t"),
    ],
)
def test_both_names_of_an_option_set_the_same_field(sglang, vllm, field, value):
    for name in (sglang, vllm):
        assert getattr(parsed(name, str(value))[0], field) == value


@pytest.mark.parametrize("name", ["--disable-radix-cache", "--no-enable-prefix-caching"])
def test_the_prefix_cache_is_on_unless_it_is_switched_off(name):
    assert parsed()[0].enable_prefix_caching is True
    assert parsed(name)[0].enable_prefix_caching is False


def test_the_servers_options_reach_the_server():
    _, server = parsed(
        "--port", "81", "--host", "::1", "--cors-origin", "a", "--cors-origin", "b", "--shutdown-grace", "2"
    )
    assert (server.port, server.host, server.cors_origins, server.shutdown_grace) == (81, "::1", ("a", "b"), 2.0)


def test_the_api_key_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("CORE_API_KEY", "secret")
    assert parsed()[1].api_key == "secret"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2GiB", 2 * 1024**3),
        ("512mib", 512 * 1024**2),
        ("1.5GB", 1_500_000_000),
        ("1000", 1000),
        ("4k", 4000),
        ("1 KiB", 1024),
    ],
)
def test_sizes_are_read_in_bytes(text, value):
    assert byte_size(text) == value


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "2 GiBs", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(click.BadParameter, match="is not a size"):
        byte_size(text)


def test_a_size_that_is_none_names_its_option(capsys):
    assert run(["--kv-cache-memory", "lots"]) == 2
    assert "--kv-cache-memory" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ failing


def test_an_unknown_option_is_refused_with_the_nearest_name(capsys):
    assert run(["--modle-path", "x"]) == 2
    assert "--model-path" in capsys.readouterr().err


def test_an_unknown_command_is_refused_with_the_nearest_name(capsys):
    assert run(["explian", "x"]) == 2
    assert "explain" in capsys.readouterr().err


def test_an_option_before_a_command_is_refused_since_it_would_change_nothing(capsys):
    assert run(["--port", "80", "plugins"]) == 2
    assert "--port stands before the command 'plugins'" in capsys.readouterr().err


def test_an_error_for_the_user_is_one_line_and_exit_code_one(capsys):
    assert run(["--block-size", "0"]) == 1
    out, err = capsys.readouterr()
    assert err == "core-serve: error: block_size must be a positive integer, got 0.\n"
    assert out == ""


def test_a_path_that_is_not_there_is_one_line(capsys):
    assert run(["explain", "/no/such/model"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("core-serve: error: There is no file or folder '/no/such/model'")
    assert err.count("\n") == 1


def test_help_is_shown_and_is_no_error(capsys):
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("--model-path", "--kv-cache-memory", "explain", "plugins", "generate", "chat"):
        assert name in out


def test_the_version_is_the_packages(capsys):
    import core

    assert run(["--version"]) == 0
    assert core.__version__ in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ plugins


def test_plugins_to_disable_are_read_before_the_line_is_parsed():
    assert disabled_in(["--disable-plugin", "a", "explain", "m", "--disable-plugin=b"]) == ("a", "b")
    assert disabled_in(["generate", "--", "--disable-plugin", "a"]) == ()
    assert disabled_in(["--disable-plugin"]) == ()


@pytest.mark.parametrize(
    "argv", [["plugins", "--disable-plugin", "native_llama"], ["--disable-plugin=native_llama", "plugins"]]
)
def test_a_plugin_is_disabled_before_or_after_the_command(argv, capsys):
    assert run(argv) == 0
    out = capsys.readouterr().out
    assert "native_llama" not in out
    assert "builtin" in out


def test_a_disabled_plugin_reaches_the_engines_config(folder, capsys):
    argv = ["explain", folder, "--device", "cpu", "--json"]
    assert run(argv) == 0
    assert json.loads(capsys.readouterr().out)["model_impl"]["chosen"] == "native_llama"
    assert run(["--disable-plugin", "native_llama", *argv]) == 0
    assert json.loads(capsys.readouterr().out)["model_impl"]["chosen"].startswith("transformers/")


def test_plugins_as_json_name_distribution_version_and_hooks(capsys):
    assert run(["plugins", "--json"]) == 0
    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert listed["builtin"]["distribution"] == "core-serve"
    assert "provide_checkpoint" in listed["builtin"]["hooks"]
    assert listed["native_llama"]["api"] == "1.0"


# ------------------------------------------------------------------------------------------------ explain


def test_explain_shows_the_ranked_table_without_weights(folder, capsys):
    assert run(["explain", folder, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for part in ("model type: llama", "native_llama", "100", "transformers/paged", "torch_reference", "serves:"):
        assert part in out


def test_explain_native_for_a_model_without_one_is_an_error_with_reasons(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    assert run(["explain", str(tmp_path), "--model-impl", "native"]) == 1
    assert "--model-impl native: no native model implementation" in capsys.readouterr().err


def test_explain_an_unknown_implementation_lists_those_that_there_are(folder, capsys):
    assert run(["explain", folder, "--model-impl", "llama.cpp"]) == 1
    err = capsys.readouterr().err
    assert "--model-impl llama.cpp" in err
    assert "native_llama" in err


def test_explain_imports_no_model_code_of_transformers(folder):
    code = (
        "import sys; from core.cli import run; assert run(sys.argv[1:]) == 0; "
        "print([name for name in sys.modules if 'modeling_' in name or name == 'fastapi'])"
    )
    argv = [sys.executable, "-c", code, "explain", folder, "--device", "cpu", "--json"]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "[]"


# ------------------------------------------------------------------------------------------------ answers


def answer(capsys, *argv):
    assert run(argv) == 0
    return capsys.readouterr().out


def test_generate_prints_the_answer_of_the_model(tiny_model, capsys):
    from core import LLM, SamplingParams

    argv = (
        "generate",
        "w3 w4",
        "--raw",
        "--model",
        tiny_model,
        "--device",
        "cpu",
        "--max-tokens",
        "5",
        "--temperature",
        "0",
    )
    with LLM(tiny_model, device="cpu") as llm:
        expected = llm.generate("w3 w4", SamplingParams(temperature=0, max_tokens=5))[0].outputs[0].text
    assert answer(capsys, *argv) == expected + "\n"


def test_generate_uses_the_chat_template_unless_told_otherwise(tiny_model, capsys):
    flags = ("--model", tiny_model, "--device", "cpu", "--max-tokens", "4")
    plain = answer(capsys, "generate", "w3 w4", *flags)
    assert plain == answer(capsys, "generate", "w3 w4", "--chat", *flags)
    assert plain == answer(capsys, "generate", "w3 w4 w9", "--raw", *flags)


def test_generate_reads_its_prompt_from_stdin(tiny_model, capsys, monkeypatch):
    flags = ("--raw", "--model", tiny_model, "--device", "cpu", "--max-tokens", "4")
    monkeypatch.setattr("sys.stdin", io.StringIO("w3 w4"))
    assert answer(capsys, "generate", "-", *flags) == answer(capsys, "generate", "w3 w4", *flags)


def test_a_bad_sampling_parameter_is_refused_before_the_model_is_loaded(capsys):
    assert run(["generate", "hello", "--model", "/no/such/model", "--max-tokens", "0"]) == 1
    assert "max_tokens must be at least 1" in capsys.readouterr().err


def test_chat_remembers_forgets_and_ends(tiny_model, capsys, monkeypatch):
    lines = "w3\nw4\n/reset\nw3\n/what\n/exit\nw5\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    argv = ["chat", "--model", tiny_model, "--device", "cpu", "--max-tokens", "3", "--temperature", "0"]
    assert run(argv) == 0
    out, err = capsys.readouterr()
    answers = out.replace("> ", "").splitlines()
    assert len(answers) == 3
    assert answers[0] == answers[2]
    assert "conversation is forgotten" in err
    assert "There is no command /what" in err


def test_chat_goes_on_after_a_prompt_that_is_too_long(tiny_model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w3 " * 100 + "\nw4\n"))
    assert run(["chat", "--model", tiny_model, "--device", "cpu", "--max-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert "core-serve: error: " in err
    assert len(out.replace("> ", "").splitlines()) == 1


# ------------------------------------------------------------------------------------------------ the installed command


def test_the_command_is_installed_and_prints_no_traceback():
    command = [sys.executable, "-c", "from core.cli import main; main()", "--disable-plugin", "nobody"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("core-serve: error: --disable-plugin nobody: there is no plugin of that name.")


def test_ctrl_c_stops_an_answer_between_two_deltas_and_closes_its_stream():
    from core.commands.offline import print_answer
    from core.outputs import Delta

    closed = []

    def stream():
        try:
            yield Delta("0", text="one ")
            os.kill(os.getpid(), signal.SIGINT)
            yield Delta("0", text="two ")
            yield Delta("0", text="three")
        finally:
            closed.append(True)

    before = signal.getsignal(signal.SIGINT)
    assert print_answer(stream()) == ("one two ", False)
    assert closed == [True]
    assert signal.getsignal(signal.SIGINT) is before
