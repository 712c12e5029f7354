"""The kernels against plain torch: in Triton's interpreter, or on a GPU where there is one.

`make test` runs them by way of ../test_interpreter.py: TRITON_INTERPRET must be set before anything imports Triton.
"""

import os
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
READY = DEVICE == "cuda" or INTERPRETED
sys.path.insert(0, os.path.dirname(__file__))  # for helpers.py and paged_case.py
collect_ignore_glob = [] if READY else ["test_*.py"]
ENGINES = pytest.mark.skipif(not INTERPRETED, reason="runs an engine in the interpreter; on a GPU tests/gpu does")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "interpreted" and "device" not in item.fixturenames:
            item.add_marker(ENGINES)


@pytest.fixture(autouse=True)
def fresh_inputs(request):
    """Draw other numbers in every run, and the same ones in CI; a failing run says which."""
    seed = int(os.environ.get("KERNEL_SEED", "0")) or (
        1 if "CI" in os.environ else int.from_bytes(os.urandom(3), "big")
    )
    torch.manual_seed(seed)
    request.node.add_report_section("setup", "seed", f"KERNEL_SEED={seed}")
    return seed


@pytest.fixture
def device():
    return DEVICE
