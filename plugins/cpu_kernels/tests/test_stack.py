"""Layers in one call give, bit for bit, what their operations give one by one.

After the last attention of a long prompt only the rows that are wanted go on, and few rows are added up in another
order: there the numbers are near.
"""

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
    assert_same(together, answers(folder, **options), options.get("budget", 24))


def assert_same(found, wanted, budget):
    """Bit for bit, but for steps so large that they run in blocks."""
    if budget < 48:
        assert found == wanted
        return
    for one, other in zip(found, wanted, strict=True):
        assert [token for token, _ in one] == [token for token, _ in other]
        assert [number for _, number in one] == pytest.approx([number for _, number in other], abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_layers_together_give_the_numbers_of_layers_one_by_one(name, runs, tmp_path):
    assert_same_together(checkpoint_of(name, tmp_path), runs)


@pytest.mark.parametrize("budget", [24, 64, 256])
def test_the_number_of_threads_changes_nothing(budget, threads, runs, tmp_path):
    """Few rows are cut by columns, more are prepared row by row, many go in blocks: where, depends on the threads."""
    folder = checkpoint_of("llama", tmp_path)
    wanted = None
    for count in (1, 2, 5):
        threads(count)
        found = answers(folder, budget)
        wanted = wanted or found
        assert_same(found, wanted, budget)
    assert runs.together > 0


@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_every_instruction_set_runs_layers_together(instruction_set, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("CORE_CPU_KERNELS_ISA", instruction_set)
    assert_same_together(checkpoint_of("llama", tmp_path), runs)


@pytest.mark.parametrize("name", ["llama with biases", "mistral", "qwen3"])
def test_long_prompts_run_in_blocks_and_a_cache_may_have_two_bytes(name, runs, tmp_path):
    assert_same_together(checkpoint_of(name, tmp_path), runs, budget=256, kv_cache_dtype="bfloat16")


@pytest.mark.parametrize("budget", [24, 256])
@pytest.mark.parametrize("method", ["int4", "int8"])
def test_quantized_layers_give_the_same_together(method, budget, runs, tmp_path):
    pytest.importorskip("core_quant_int")
    assert_same_together(checkpoint_of("llama", tmp_path), runs, budget=budget, quantization=method)


@pytest.mark.parametrize("budget", [24, 256])
def test_projections_that_stay_apart_are_parts_of_one_stage(budget, runs, tmp_path, monkeypatch):
    """As quantized ones do whose formats differ."""
    folder = checkpoint_of("llama with biases", tmp_path)
    wanted, join = answers(folder, budget), CpuKernels.decoder

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
    assert_same(answers(folder, budget), wanted, budget)
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
        seen.append(args[6] is not None)
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


def test_only_the_wanted_rows_of_a_long_prompt_go_on_after_the_last_attention(tmp_path):
    folder, seen = checkpoint_of("llama", tmp_path), []
    with LLM(model=str(folder), skip_tokenizer_init=True, max_model_len=256, block_size=4) as llm:
        kernel = llm._engine.runner.model.stack.kernel
        run = kernel.run

        def twice(x, *args):
            whole = x.clone()
            run(whole, *args[:-1], None)
            run(x, *args)
            seen.append((whole, x.clone(), args[-1]))

        kernel.run = twice
        prompts = [{"prompt_token_ids": [5 + i % 90 for i in range(count)]} for count in (100, 200, 1)]
        llm.generate(prompts, SamplingParams(max_tokens=1, ignore_eos=True))
    (whole, found, rows) = seen[0]
    assert rows.tolist() == [99, 299, 300]
    assert torch.allclose(found[rows], whole[rows], rtol=1e-5, atol=1e-5)
    others = torch.ones(len(found), dtype=torch.bool).index_fill_(0, rows, False)
    assert not torch.isclose(found[others], whole[others]).all(1).any()
