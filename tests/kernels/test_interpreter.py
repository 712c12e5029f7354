"""Runs the kernel tests of interpreted/ in processes of their own: TRITON_INTERPRET=1 must be set before the import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(file.name for file in (HERE / "interpreted").glob("test_*.py"))
pytest.importorskip("triton", reason="the kernels need Triton: pip install 'core-serve[gpu]'")


def run(file, *arguments, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"--rootdir={HERE}", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([*command, str(HERE / "interpreted" / file)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", FILES)
def test_kernels_give_what_torch_gives(file):
    run(file, "-m", "not slow")


@pytest.mark.grid
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file", FILES)
def test_kernels_give_what_torch_gives_over_the_whole_grid(file):
    run(file, "-m", "slow or not slow", "--timeout=900")
