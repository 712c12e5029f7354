"""The survey of transformers' models, through its real command: right ones, one that cannot be built, broken ones."""

import json

import pytest

from core.cli import run
from core.errors import ConfigError
from core.supported_check import Checked, Served, Stopped, in_process, start_context
from core.supported_models import causal_models, choose
from core.supported_page import differences, markdown, steady, verdict
from core.supported_results import fingerprint, read_results

RIGHT = Served("right", impl="transformers/rows")
WRONG = Served("wrong", "token 3 is 7", impl="transformers/paged")


def checked(**known):
    return Checked("some", "SomeForCausalLM", "5.0", **known)


def survive():
    return "well"


def fail():
    raise ValueError("a size\nis wrong")


def die():
    import os

    print("last words", flush=True)
    os._exit(7)


def hang():
    import time

    time.sleep(600)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory):
    """The command's exit code, its results file and its page, for a native model, a recurrent one and a drafter."""
    folder = tmp_path_factory.mktemp("survey")
    results, page = folder / "results.jsonl", folder / "page.md"
    only = "llama,mamba,gemma4_assistant"
    argv = ["supported-models", "--only", only, "--jobs", "2", "--resume", str(results), "--output", str(page)]
    return run(argv), results, page, argv


def test_each_model_type_gets_a_row_that_says_who_serves_it_and_whether_it_is_right(surveyed):
    code, _, page, _ = surveyed
    text = page.read_text()
    assert code == 0
    assert "| `llama` | `LlamaForCausalLM` | native_llama | paged | right |" in text
    assert "| `mamba` | `MambaForCausalLM` | - | rows | right |" in text
    assert "| `gemma4_assistant` | `Gemma4AssistantForCausalLM` | - | - | cannot be built: " in text
    assert "3 model types: 2 right, 1 cannot be built." in text


def test_the_results_keep_why_each_faster_tier_declined(surveyed):
    _, results, _, _ = surveyed
    mamba = next(found for found in read_results(results) if found.model_type == "mamba")
    assert [name for name, _ in mamba.fallback.declined] == ["transformers/paged"]
    assert "attention" in mamba.fallback.declined[0][1]


def test_what_the_results_file_holds_is_not_checked_again(surveyed, capsys):
    _, results, page, argv = surveyed
    before, wanted = results.read_text(), page.read_text()
    assert run(argv) == 0
    assert capsys.readouterr().err == ""
    assert (results.read_text(), page.read_text()) == (before, wanted)


def test_a_survey_with_a_wrong_model_ends_with_exit_code_1_and_without_output_prints_the_table(tmp_path, capsys):
    line = {"model_type": "llama", "class_name": "LlamaForCausalLM", "code": fingerprint()}
    line |= {"unbuilt": "", "unsure": "", "auto": vars(WRONG), "fallback": vars(RIGHT)}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    assert run(["supported-models", "--only", "llama", "--resume", str(tmp_path / "results.jsonl")]) == 1
    assert "auto: wrong: token 3 is 7; transformers: right" in capsys.readouterr().out


def test_a_page_that_says_what_a_fresh_run_finds_passes_and_another_is_named_row_by_row(surveyed, tmp_path, capsys):
    _, _, page, argv = surveyed
    assert run([*argv, "--check", str(page)]) == 0
    other = tmp_path / "other.md"
    other.write_text(page.read_text().replace("| - | rows | right |", "| - | cache | right |"))
    capsys.readouterr()
    assert run([*argv, "--check", str(other)]) == 1
    out = capsys.readouterr().out
    assert (
        "mamba: the page has | `MambaForCausalLM` | - | cache | right |; found | `MambaForCausalLM` | - | rows" in out
    )
    assert "llama" not in out


def test_results_of_other_code_are_checked_again(tmp_path, capsys):
    line = {"model_type": "gemma4_assistant", "class_name": "Gemma4AssistantForCausalLM", "code": "another"}
    line |= {"unbuilt": "an old reason", "unsure": "", "auto": None, "fallback": None}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    assert run(["supported-models", "--only", "gemma4_assistant", "--resume", str(tmp_path / "results.jsonl")]) == 0
    assert "an old reason" not in capsys.readouterr().out
    assert [found.code for found in read_results(tmp_path / "results.jsonl")] == ["another", fingerprint()]


# ------------------------------------------------------------------------------------------------ its parts


def test_an_unknown_model_type_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="'llamma'"):
        choose(["llama", "llamma"])
    assert choose([]) == causal_models()


def test_a_broken_results_file_is_an_error_that_names_the_line(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"model_type": "llama"}\n')
    with pytest.raises(ConfigError, match="Line 1 of"):
        list(read_results(tmp_path / "results.jsonl"))


@pytest.mark.parametrize(
    ("step", "reason"),
    [(fail, "ValueError: a size is wrong"), (die, "exit code 7: last words"), (hang, "no answer in 3 s")],
)
def test_a_step_that_fails_crashes_or_hangs_is_a_finding(step, reason):
    with pytest.raises(Stopped, match=reason):
        in_process(start_context(), 3.0 if step is hang else 60.0, step)
    assert in_process(start_context(), 60.0, survive) == "well"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (checked(auto=RIGHT, fallback=RIGHT), "right"),
        (checked(auto=RIGHT, fallback=WRONG), "auto: right; transformers: wrong: token 3 is 7"),
        (checked(unbuilt="too large"), "cannot be built: too large"),
        (checked(unsure="generate fails: why"), "no reference: generate fails: why"),
        (checked(unsure="0.1 apart", auto=RIGHT, fallback=RIGHT), "no self-consistent reference (generate with"),
    ],
)
def test_each_outcome_has_its_words(found, words):
    assert verdict(found).startswith(words)


def test_a_reason_with_a_bar_stays_in_its_cell():
    assert r"a \| b" in markdown([checked(unbuilt="a | b")], "5.0")


def test_the_page_keeps_of_a_reason_what_every_machine_says():
    one = steady("OSError at 0x7f3a01b2c9d0: transformers cannot load /tmp/tmpab12_x/config.json, off by 0.0123 nats")
    assert one == steady("OSError at 0x55aa01b2c9d0: transformers cannot load /tmp/tmpzz9, off by 3.1e-05 nats")
    assert "cannot load the checkpoint" in one
    assert steady("hidden_size must be 0, got 256") == "hidden_size must be 0, got 256"
    assert len(steady("a" * 1000)) < 300


PAGE = markdown([checked(auto=RIGHT, fallback=RIGHT)], "5.0")


@pytest.mark.parametrize(
    ("fresh", "words"),
    [
        (markdown([checked(auto=RIGHT, fallback=WRONG)], "5.0"), "some: the page has"),
        (markdown([], "5.0"), "this transformers has no such model type"),
        (markdown([checked(auto=RIGHT, fallback=RIGHT)], "5.1"), "transformers 5.1"),
    ],
)
def test_each_difference_between_two_pages_is_named(fresh, words):
    assert differences(PAGE, PAGE) == []
    assert words in "\n".join(differences(PAGE, fresh))


def test_of_chosen_model_types_only_their_rows_are_compared():
    assert differences(PAGE, markdown([], "5.1"), rows_only=True) == []
    assert "is not on the page" in differences(markdown([], "5.0"), PAGE, rows_only=True)[0]
