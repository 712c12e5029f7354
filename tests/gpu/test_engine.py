"""The engine on a GPU: the tokens of transformers, captured or not, in one wait a step, in the memory it may take."""

import pytest
import torch

from core import LLM, SamplingParams
from core.testing import assert_matches_dequantized, assert_matches_transformers, default_prompts, tiny_checkpoint

NATIVE = ["llama", "mistral", "qwen3"]
PAGED = ["gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "mixtral", "qwen3_moe", "gpt2"]
ROWS = ["mamba2", "bamba", "qwen3_next", "recurrent_gemma", "lfm2", "mpt"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=11, max_tokens=12, ignore_eos=True)
HALF = 0.15  # nats: how far logprobs of these models may lie apart in bfloat16


def opened(folder, **options):
    tight = {"block_size": 4, "max_num_batched_tokens": 12, "dtype": "float32", "kv_cache_memory": 2**22}
    tight |= {"device": "cuda", "max_model_len": 64, "skip_tokenizer_init": True}
    return LLM(model=str(folder), **(tight | options))


def tokens_of(llm, params=GREEDY):
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in default_prompts()], params)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("model_type", NATIVE)
def test_native_models_answer_like_transformers(model_type):
    assert assert_matches_transformers(model_type, device="cuda") == "native_llama"


@pytest.mark.parametrize("model_type", [*NATIVE[:1], *PAGED])
def test_the_paged_fallback_answers_like_transformers(model_type):
    served = assert_matches_transformers(model_type, "transformers", device="cuda")
    assert served == "transformers/paged"


@pytest.mark.parametrize("model_type", ROWS)
def test_the_rows_fallback_answers_like_transformers(model_type):
    served = assert_matches_transformers(model_type, "transformers", device="cuda")
    assert served == "transformers/rows"


@pytest.mark.parametrize("impl", ["native", "transformers"])
@pytest.mark.parametrize("model_type", NATIVE)
def test_bfloat16_answers_like_transformers_where_that_is_sure(model_type, impl):
    assert_matches_transformers(model_type, impl, device="cuda", dtype="auto", tolerance=HALF)


@pytest.mark.parametrize("method", ["int4", "int8"])
@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_weights_quantized_on_the_fly_answer_like_their_floats(impl, method, tmp_path):
    folder = tiny_checkpoint("llama", tmp_path, hidden_size=64)
    assert_matches_dequantized(folder, impl, quantization=method, device="cuda")


def test_it_runs_on_its_own_kernels(llama):
    with opened(llama) as llm:
        assert llm.info.attention_name == "triton"
        assert llm.info.device == "cuda"


# ------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("impl", ["native", "transformers"])
@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_captured_steps_give_the_tokens_of_plain_ones(llama, params, impl):
    with opened(llama, model_impl=impl) as llm:
        captured = tokens_of(llm, params)
        assert llm._engine.runner.graphs._made and not llm._engine.runner.graphs.given_up
    with opened(llama, model_impl=impl, enable_cuda_graph=False) as llm:
        assert llm._engine.runner.graphs is None
        assert tokens_of(llm, params) == captured


def test_drawn_tokens_are_those_of_a_cpu(llama):
    with opened(llama) as llm:
        drawn = tokens_of(llm, DRAWN)
    with opened(llama, device="cpu") as llm:
        assert tokens_of(llm, DRAWN) == drawn


@pytest.mark.parametrize("graphs", [True, False], ids=["captured", "plain"])
def test_a_step_waits_for_the_gpu_once_for_its_tokens(llama, graphs, monkeypatch):
    with opened(llama, enable_cuda_graph=graphs) as llm:
        wanted = tokens_of(llm)  # compiles and captures
        llm.reset_prefix_cache()
        device, waits = llm._engine.runner.device, []
        read = device.read

        def read_once(x):
            torch.cuda.set_sync_debug_mode("default")
            waits.append(x.shape)
            found = read(x)
            torch.cuda.set_sync_debug_mode("error")
            return found

        monkeypatch.setattr(device, "read", read_once)
        steps, step = [], llm._engine.step
        monkeypatch.setattr(llm._engine, "step", lambda: (steps.append(1), step())[1])
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert tokens_of(llm) == wanted
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert 0 < len(waits) <= len(steps)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "gemma2"])
def test_the_fallback_says_why_a_step_is_not_captured(model_type, tmp_path):
    with opened(tiny_checkpoint(model_type, tmp_path), model_impl="transformers") as llm:
        tokens_of(llm)
        graphs = llm._engine.runner.graphs
        assert graphs._made or graphs.given_up


def test_requests_that_do_not_fit_together_are_preempted_and_answered_all_the_same(llama):
    with opened(llama) as llm:
        wanted = tokens_of(llm)
    with opened(llama, kv_cache_memory=None, num_blocks=16) as llm:
        assert tokens_of(llm) == wanted


# ------------------------------------------------------------------------------------------------ memory


def test_weights_and_kv_take_the_share_that_they_may(tmp_path):
    wide = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 256, "max_position_embeddings": 8192}
    folder = tiny_checkpoint("llama", tmp_path, **wide)  # 128 KiB of K and V a token
    _, total = torch.cuda.mem_get_info()
    before = torch.cuda.memory_allocated()
    room = {"kv_cache_memory": None, "max_model_len": 8192}
    with opened(folder, mem_fraction_static=0.2, enable_cuda_graph=False, **room) as llm:
        free, _ = torch.cuda.mem_get_info()
        assert 0.18 < 1 - free / total < 0.22
        tokens_of(llm)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + 2**26  # the workspace of torch's products


def test_a_closed_engine_leaves_room_for_the_next(llama):
    for _ in range(3):
        with opened(llama, kv_cache_memory=None, mem_fraction_static=0.6) as llm:
            tokens_of(llm)
