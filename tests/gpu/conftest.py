"""The engine on a real GPU: `make test-gpu`. Without one there is nothing to collect."""

import gc

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Give back what a test's engines held: their pools are sized from what is free."""
    yield
    gc.collect()
    torch.cuda.empty_cache()
