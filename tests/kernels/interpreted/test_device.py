"""The engine on a device that stages (a played one): the tokens of a CPU, in so many copies and waits a step."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core import LLM, SamplingParams
from core.decode_graphs import Sizes
from core.device import NotCaptured
from core.request import Request
from core.runner import Runner
from core.sampler import Sampler
from core.testing import tiny_checkpoint

PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [40, 41, 42]]
SAID = {"max_tokens": 4, "ignore_eos": True}
PARAMS = {
    "greedy": SamplingParams(temperature=0, **SAID),
    "drawn": SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=11, **SAID),
    "edited": SamplingParams(
        temperature=0,
        logit_bias={3: 2.0},
        repetition_penalty=1.3,
        frequency_penalty=0.1,
        allowed_token_ids=list(range(2, 90)),
        min_tokens=4,
        **SAID,
    ),
}
SMALL = {"num_hidden_layers": 2, "num_key_value_heads": 1}  # the interpreter runs the heads one by one
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")  # results that Python needs


class CountingDevice:
    """A GPU as far as its users can tell, in the host's memory. A replay runs what was captured on the same buffers."""

    stages = True
    device = torch.device("cpu")

    def __init__(self):
        self.copies = self.waits = self.captures = self.replays = 0

    def host_buffer(self, size):
        return torch.zeros(size, dtype=torch.uint8)

    def buffer(self, size):
        return torch.full((size,), 0xFF, dtype=torch.uint8)  # ids far out of range, until something is copied

    def copy(self, source, target):
        self.copies += 1
        target.copy_(source)
        source.fill_(0xFF)  # whoever still read the host's side would notice

    def read(self, x):
        self.waits += 1
        return x.clone()

    def capture(self, run):
        self.captures += 1
        return PlayedGraph(self, run)


class PlayedGraph:
    def __init__(self, device, run):
        self.device, self.run, self.output = device, run, run()

    def replay(self):
        self.device.replays += 1
        return self.output.copy_(self.run())


class Watch(TorchDispatchMode):
    """Raise where code that runs on the device would make the host wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        assert not masked and name not in WAITING, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


def opened(folder, device=None, graphs=True, **options):
    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        attention_backend="triton",
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=12,  # prompts are cut into chunks, decoded beside each other
        block_size=4,
        kv_cache_memory=2**20,
        **options,
    )
    if device is not None:
        engine = llm._engine
        old = engine.runner
        sizes = Sizes(4, 64, 4) if graphs else None
        engine.runner = Runner(old.model, old.attention, 4, device, old.reaches, sizes)
        engine.sampler = Sampler(old.model.vocab_size, engine.eos_token_ids, device)
        forward, plan = old.model.forward, old.attention.plan_staged
        old.model.forward = watched(forward)
        old.attention.plan_staged = watched(plan)
    return llm


def watched(function):
    def call(*arguments):
        with Watch():
            return function(*arguments)

    return call


@dataclass
class Run:
    tokens: list
    device: CountingDevice | None
    kinds: dict  # (copies, waits) that steps took, by whether a graph ran them


def run(llm, device=None, params="greedy"):
    """Answer the prompts and close."""
    engine, kinds = llm._engine, {"captured": set(), "plain": set()}
    step = engine.step

    def counting():
        before = (device.copies, device.waits, device.replays)
        deltas = step()
        copies, waits, replays = (
            now - then for now, then in zip((device.copies, device.waits, device.replays), before, strict=True)
        )
        kinds["captured" if replays else "plain"].add((copies, waits))
        return deltas

    if device is not None:
        engine.step = counting
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], PARAMS[params])
    llm.close()
    return Run([output.outputs[0].token_ids for output in outputs], device, kinds)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"), **SMALL)


@pytest.fixture(scope="module")
def ran(llama):
    """Return a function that runs a llama, each way once: "captured" or "plain" on a device, or "without" one."""

    @cache
    def run_once(params, way):
        device = None if way == "without" else CountingDevice()
        return run(opened(llama, device, graphs=way == "captured"), device, params)

    return run_once


def test_a_plain_step_gives_the_same_tokens_and_captures_nothing(ran):
    plain = ran("greedy", "plain")
    assert plain.tokens == ran("greedy", "without").tokens
    assert (plain.device.captures, plain.device.replays) == (0, 0)


def test_captured_steps_give_the_same_tokens(ran):
    captured = ran("greedy", "captured")
    assert captured.tokens == ran("greedy", "without").tokens
    assert 0 < captured.device.captures < captured.device.replays


def test_captured_steps_of_the_fallback_give_the_same_tokens(llama, ran):
    device = CountingDevice()
    found = run(opened(llama, device, model_impl="transformers"), device)
    assert found.tokens == ran("greedy", "without").tokens
    assert 0 < device.captures < device.replays


class FrozenGraph(PlayedGraph):
    """Gives the first step's logits again, as if Python had decided them."""

    def replay(self):
        self.device.replays += 1
        return self.output


def test_a_graph_of_the_fallback_that_differs_from_a_plain_step_is_given_up(llama, ran, caplog):
    device = CountingDevice()
    device.capture = lambda run: FrozenGraph(device, run)
    llm = opened(llama, device, model_impl="transformers")
    graphs = llm._engine.runner.graphs
    assert run(llm, device).tokens == ran("greedy", "without").tokens
    assert "a graph's logits differ from a plain step's" in graphs.given_up
    assert caplog.text.count("are not captured as graphs") == 1


def test_a_step_that_waits_is_run_plainly(llama, ran):
    def refuse(run):
        raise NotCaptured("a step waits for the GPU")

    device = CountingDevice()
    device.capture = refuse
    assert run(opened(llama, device, model_impl="transformers"), device).tokens == ran("greedy", "without").tokens
    assert device.replays == 0


def test_a_window_is_kept_in_captured_steps(tmp_path):
    folder = tiny_checkpoint("mistral", tmp_path, sliding_window=6, **SMALL)
    device = CountingDevice()
    assert run(opened(folder, device), device).tokens == run(opened(folder)).tokens
    assert device.replays


def test_a_decode_step_is_one_copy_and_one_wait(ran):
    assert ran("greedy", "captured").kinds == {"captured": {(1, 1)}, "plain": {(1, 1)}}


def test_a_drawing_step_is_two_copies_and_one_wait(ran):
    assert ran("drawn", "captured").kinds["captured"] == {(2, 1)}


def test_edits_of_logits_are_one_copy_more_and_no_wait(ran):
    assert ran("edited", "captured").kinds["captured"] == {(2, 1)}
    assert ran("edited", "captured").tokens == ran("edited", "without").tokens
    assert ran("edited", "captured").tokens != ran("greedy", "captured").tokens


def test_drawn_tokens_do_not_depend_on_the_batch_or_on_graphs(ran):
    together = ran("drawn", "captured").tokens
    assert together == ran("drawn", "plain").tokens
    assert together == ran("drawn", "without").tokens  # filtered requests: the CPU's own tokens


def test_a_row_without_finite_logits_fails_alone():
    sampler = Sampler(8, (), CountingDevice())
    logits = torch.randn(3, 8)
    logits[1, 4] = float("nan")
    for params in ("greedy", "drawn"):
        rows = [Request(str(index), [1], PARAMS[params], 4) for index in range(3)]
        failed = [token.failed is not None for token in sampler.sample(logits, rows)]
        assert failed == [False, True, False]


def test_a_model_that_reads_more_than_tensors_is_not_captured(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    folder = tiny_checkpoint("llama", tmp_path, max_position_embeddings=64, rope_parameters=rope)
    device = CountingDevice()
    assert opened(folder, device)._engine.runner.graphs is None
