"""The whole engine on attention in place gives the tokens that it gives on the core's own CPU attention."""

import pytest
import torch

from core import LLM, SamplingParams
from core.testing import tiny_checkpoint

pytest.importorskip("core_cpu_kernels", reason="not installed where there is no C++ compiler")

PROMPTS = [[5], list(range(7, 26)), list(range(7, 20)) + [3, 4], list(range(40, 90))]


def outputs_of(folder, backend, max_tokens=8, **options):
    """Prompts are cut into chunks and decoded beside each other; the third and a second round reuse prefixes."""
    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        attention_backend=backend,
        max_model_len=96,
        max_num_batched_tokens=12,
        block_size=4,
        kv_cache_memory=2**22,
        **options,
    )
    try:
        assert llm.info.attention_name == (backend or "cpu_kernels")
        prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=1)
        return [out.outputs[0] for _ in range(2) for out in llm.generate(prompts, params)]
    finally:
        llm.close()


def logprobs_of(outputs):
    rows = [[row[token].logprob for row, token in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs]
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("model_type", "impl"),
    [("llama", "native"), ("llama", "transformers"), ("gemma3_text", "transformers"), ("gpt_oss", "transformers")],
)
def test_the_engine_gives_the_same_tokens(model_type, impl, tmp_path):
    folder = tiny_checkpoint(model_type, tmp_path)
    found, wanted = outputs_of(folder, None, model_impl=impl), outputs_of(folder, "cpu", model_impl=impl)
    assert [o.token_ids for o in found] == [o.token_ids for o in wanted]
    torch.testing.assert_close(logprobs_of(found), logprobs_of(wanted), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["cpu_kernels", "cpu", "torch_reference"])
def test_a_cache_of_two_bytes_gives_nearly_the_same(backend, tmp_path):
    """Logprobs of the tokens that are chosen first: after a token that differs, texts are no longer comparable."""
    folder = tiny_checkpoint("llama", tmp_path)
    exact = logprobs_of(outputs_of(folder, backend, 1))
    for dtype in ("bfloat16", "float16"):
        rounded = logprobs_of(outputs_of(folder, backend, 1, kv_cache_dtype=dtype))
        assert (exact - rounded).abs().max() < 0.05
        assert not torch.equal(exact, rounded), "the cache was not rounded"
