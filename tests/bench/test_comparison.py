"""`make bench`: every engine that is always there runs to its end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "bench" / "run.py"


@pytest.fixture
def compare(tmp_path):
    """With a home of its own, where no peer is set up."""
    environment = os.environ | {"HOME": str(tmp_path / "home")}
    return lambda *argv: subprocess.run(
        [sys.executable, str(RUN), *map(str, argv)], capture_output=True, text=True, env=environment
    )


@pytest.mark.slow
def test_engines_stand_side_by_side_and_one_that_fails_is_named(compare, folder, tmp_path):
    sizes = "--rounds", 1, "--concurrency", "1,2", "--prompt-len", 16, "--new", 4
    done = compare("--model", folder, *sizes, "--peer", "vllm=false", "--json", tmp_path / "all.json")
    report = json.loads((tmp_path / "all.json").read_text())
    assert report["failed"] == {"vllm": "exit code 1"}, done.stdout + done.stderr
    assert done.returncode == 1
    engines = ("native", "transformers", "generate")
    assert set(report["seconds"]) == {f"{engine}, {count}" for engine in engines for count in (1, 2)}
    assert all(min(seconds) > 0 for seconds in [*report["seconds"].values(), *report["bound_s"].values()])
    assert report["machine"]["gflops"] > 0
    for words in ("core-serve, native", "core-serve, fallback", "transformers generate", "(bound, native)"):
        assert words in done.stdout
    assert "vllm failed: exit code 1" in done.stdout


def test_an_unknown_peer_is_refused(compare):
    done = compare("--model", "x", "--peer", "nobody=python")
    assert done.returncode == 2
    assert "one of vllm, llamacpp" in done.stderr
