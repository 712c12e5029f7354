"""Layers in one call give, bit for bit, what their operations give one by one."""

from dataclasses import replace

import pytest
import torch

from core import LLM, SamplingParams
from core.layers import LayerStack
from core.testing import tiny_checkpoint

pytest.importorskip("core_cpu_kernels", reason="not installed where there is no C++ compiler")
from core_cpu_kernels.kernels import CpuKernels
from core_cpu_kernels.library import instruction_sets
from core_cpu_kernels.stack import DecoderKernel

# One by one and together, long enough for chunks of a prompt beside decodes, prefixes that are reused, and many rows.
PROMPTS = [[5], list(range(7, 26)), list(range(7, 20)) + [3, 4], list(range(5, 85))]
WIDE = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
MODELS = {
    "llama": {"tie_word_embeddings": True},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama with dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "mistral": {"sliding_window": 11},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},  # biases, two reaches
    "qwen3": {},  # norms of Q and K by head
}


@pytest.fixture(autouse=True)
def every_linear_has_a_kernel(monkeypatch):
    """Float32 weights too, as they lie."""
    monkeypatch.setattr("core.layers.linear.can_pack", lambda weight: False)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Runs:
    """Counts what layers did together, and can forbid it."""

    def __init__(self, monkeypatch):
        self.together, self.allowed, run = 0, True, LayerStack.run

        def counted(stack, *args):
            done = self.allowed and run(stack, *args)
            self.together += done
            return done

        monkeypatch.setattr(LayerStack, "run", counted)


@pytest.fixture
def runs(monkeypatch):
    return Runs(monkeypatch)


def checkpoint_of(name, folder, **changes):
    return tiny_checkpoint(name.split()[0], folder, num_hidden_layers=3, **(WIDE | MODELS[name] | changes))


def answers(folder, budget=24, **options):
    """The ids and the logprobs of all prompts, twice; the second time prefixes are there."""
    with LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_batched_tokens=budget,
        block_size=4,
        kv_cache_memory=2**22,
        **options,
    ) as llm:
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=1)
        prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
        outputs = [out.outputs[0] for _ in range(2) for out in llm.generate(prompts, params)]
        return [
            [(token, row[token].logprob) for token, row in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs
        ]


def assert_same_together(folder, runs, **options):
    together = answers(folder, **options)
    assert runs.together > 0
    runs.allowed = False
    assert together == answers(folder, **options)


@pytest.mark.parametrize("name", MODELS)
def test_layers_together_give_the_numbers_of_layers_one_by_one(name, runs, tmp_path):
    assert_same_together(checkpoint_of(name, tmp_path), runs)


def test_the_number_of_threads_changes_nothing(threads, runs, tmp_path):
    folder = checkpoint_of("llama", tmp_path)
    wanted = None
    for count in (1, 2, 5):
        threads(count)
        found = answers(folder)
        wanted = wanted or found
        assert found == wanted, f"{count} threads"
    assert runs.together > 0


@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_every_instruction_set_runs_layers_together(instruction_set, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("CORE_CPU_KERNELS_ISA", instruction_set)
    assert_same_together(checkpoint_of("llama", tmp_path), runs)


def test_long_prompts_run_one_by_one_and_a_cache_may_have_two_bytes(runs, tmp_path):
    assert_same_together(checkpoint_of("llama", tmp_path), runs, budget=256, kv_cache_dtype="bfloat16")


def test_projections_that_stay_apart_are_parts_of_one_stage(runs, tmp_path, monkeypatch):
    """As quantized ones do whose formats differ."""
    folder = checkpoint_of("llama with biases", tmp_path)
    wanted, join = answers(folder), CpuKernels.decoder

    def split(kernels, merged, sizes):
        weights, biases = (merged._kept[part].split(sizes) for part in ("codes", "bias"))
        return [kernels.linear(*pair) for pair in zip(weights, biases, strict=True)]

    def join_split(kernels, layers, head):
        kv = 2 * 32
        return join(
            kernels,
            [
                replace(
                    parts,
                    qkv=split(kernels, parts.qkv[0], [6 * 32, kv, kv]),
                    gate_up=split(kernels, parts.gate_up[0], [320, 320]),
                )
                for parts in layers
            ],
            head,
        )

    monkeypatch.setattr(CpuKernels, "decoder", join_split)
    runs.together = 0
    assert answers(folder) == wanted
    assert runs.together > 0


def test_layers_that_are_looked_at_run_one_by_one(runs, tmp_path):
    with LLM(model=str(checkpoint_of("llama", tmp_path)), skip_tokenizer_init=True, max_model_len=64) as llm:
        model, seen = llm._engine.runner.model, []
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        handle = model.layers[1].register_forward_hook(lambda *_: seen.append(1))
        llm.generate([{"prompt_token_ids": [5, 6]}], params)
        assert len(seen) == 2 and not runs.together
        handle.remove()
        llm.generate([{"prompt_token_ids": [5, 6]}], params)
        assert len(seen) == 2 and runs.together == 2


@pytest.mark.parametrize("options", [{"attention_backend": "cpu"}, {"dtype": "bfloat16"}])
def test_another_backend_or_dtype_runs_layers_one_by_one(options, runs, tmp_path):
    answers(checkpoint_of("llama", tmp_path), **options)
    assert not runs.together


def test_a_stack_times_its_parts_when_it_is_asked_to(tmp_path):
    with LLM(model=str(checkpoint_of("llama", tmp_path)), skip_tokenizer_init=True, max_model_len=64) as llm:
        kernel = llm._engine.runner.model.stack.kernel
        for on in (False, True, False):
            kernel.time(on)
            llm.generate([{"prompt_token_ids": [5, 6]}], SamplingParams(max_tokens=2))
            times = kernel.take_times()
            assert set(times) == {"linears", "attention", "small"}
            assert all((seconds > 0) == on for seconds in times.values())


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_logits_of_the_same_call_are_those_of_norm_and_head_one_by_one(name, runs, tmp_path, monkeypatch):
    folder = checkpoint_of(name, tmp_path)
    wanted, seen, run = answers(folder), [], DecoderKernel.run

    def noted(kernel, *args):
        seen.append(args[-1] is not None)
        return run(kernel, *args)

    monkeypatch.setattr(DecoderKernel, "run", noted)
    assert answers(folder) == wanted
    assert any(seen) and not all(seen)  # decodes want all logits, chunks of prompts one or none
    monkeypatch.setattr(
        DecoderKernel, "has_head", property(lambda kernel: False, lambda kernel, value: None), raising=False
    )
    seen.clear()
    assert answers(folder) == wanted
    assert seen and not any(seen)


def test_a_head_that_is_looked_at_is_called_by_itself(runs, tmp_path):
    with LLM(model=str(checkpoint_of("llama", tmp_path)), skip_tokenizer_init=True, max_model_len=64) as llm:
        model, seen = llm._engine.runner.model, []
        model.head.register_forward_hook(lambda *_: seen.append(1))
        llm.generate([{"prompt_token_ids": [5, 6]}], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
        assert len(seen) == 3 and not runs.together
