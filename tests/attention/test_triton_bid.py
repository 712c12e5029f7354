"""Who may run Triton's attention: CUDA and ROCm; the CPU in the interpreter, by name; nobody without Triton."""

import subprocess
import sys

import pytest

from core.builtin import resolve_attention_backend
from core.choice import Wish, choose
from core.config import EngineConfig
from core.contracts import Bid, Refusal


def answers(device):
    return resolve_attention_backend(spec=None, options=EngineConfig(device=device))


def triton_answer(device):
    found = [one for one in answers(device) if "triton" in getattr(one, "name", getattr(one, "reason", ""))]
    assert len(found) == 1
    return found[0]


def winner(device, name="auto"):
    wish = Wish("attention backend", "--attention-backend", name)
    return choose([("builtin", one) for one in answers(device)], wish).winner.bid.name


@pytest.fixture
def has_triton():
    pytest.importorskip("triton")


@pytest.mark.usefixtures("has_triton")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_triton_is_the_highest_bid_on_a_gpu(device):
    assert isinstance(triton_answer(device), Bid)
    assert winner(device) == "triton"


def test_it_declines_the_cpu_and_says_how_to_have_it_there(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    answer = triton_answer("cpu")
    assert isinstance(answer, Refusal)
    assert "set TRITON_INTERPRET=1" in answer.reason


def test_it_declines_other_devices_by_name():
    assert "the device is 'mps'" in triton_answer("mps").reason


@pytest.mark.usefixtures("has_triton")
def test_in_the_interpreter_it_is_chosen_by_name_only(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert winner("cpu") == "cpu"
    assert winner("cpu", "triton") == "triton"


def test_without_triton_it_declines_and_the_rest_goes_on():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from core.builtin import resolve_attention_backend\n"
        "from core.config import EngineConfig\n"
        "found = resolve_attention_backend(spec=None, options=EngineConfig(device='cuda'))\n"
        "print([getattr(one, 'reason', one) for one in found])\n"
        "import core.attention.cpu, core.engine_build"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install 'core-serve[gpu]'" in done.stdout
