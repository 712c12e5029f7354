"""The fallback makes all its tensors where the model is: no tier mixes the host's with a GPU's."""

import pytest
import torch
from played_gpu import played_gpu

from core import LLM
from core.testing import assert_serves, default_prompts, tight_options, tiny_checkpoint, transformers_answers

OPTIONS = {"device": "cuda:0", "attention_backend": "torch_reference", "kv_cache_memory": 2**22}
TIERS = {
    "llama": "paged",
    "gpt2": "paged",
    "mixtral": "paged",
    "mamba2": "rows",
    "bamba": "rows",
    "lfm2": "rows",
    "mpt": "rows",
    "reformer": "cache",
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TIERS)
def test_a_tier_answers_like_transformers_on_a_gpu(model_type, tmp_path):
    folder, prompts = tiny_checkpoint(model_type, tmp_path), default_prompts()
    wanted = transformers_answers(folder, prompts, 6)
    with played_gpu(), LLM(model=str(folder), **tight_options("transformers") | OPTIONS) as llm:
        assert llm.model_impl_name == f"transformers/{TIERS[model_type]}"
        assert_serves(llm, prompts, wanted, 2e-3)


def test_the_played_gpu_refuses_a_tensor_of_the_host():
    with played_gpu():
        x = torch.randn(3, 4).to("cuda:0")
        assert (x @ x.T).device == x.device
        with pytest.raises(RuntimeError, match="same device"):
            x.index_select(0, torch.tensor([1]))
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(4)
