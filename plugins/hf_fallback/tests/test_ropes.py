"""A rope that depends on the longest text of a batch is evaluated for each text alone, on every tier."""

from importlib.metadata import version

import pytest
import torch
from torch import nn

from core import LLM, SamplingParams
from core.testing import assert_matches_transformers, tiny_checkpoint
from core_hf_fallback import versions
from core_hf_fallback.ropes import Ropes

OLDEST = versions.major_minor(version("transformers")) == versions.OLDEST
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.7, 3.4, 4.1],
    "original_max_position_embeddings": 16,
}
STRETCHED = {"max_position_embeddings": 16, "rope_parameters": DYNAMIC}
LONG = {"max_position_embeddings": 64, "rope_parameters": LONGROPE}
# Its `generate` computes a text anew, with the long factors, once it grows past the original length.
RESTARTS = LONG | {"original_max_position_embeddings": 16, "sliding_window": None}
# Prompts on both sides of the 16 original positions; 12 more tokens take the shorter ones across.
PROMPTS = [[5], list(range(3, 19)), list(range(20, 32)), list(range(40, 80)), list(range(60, 75))]


@pytest.mark.parametrize(
    ("model_type", "overrides", "tier"),
    [
        ("llama", STRETCHED, "transformers/paged"),
        ("llama", LONG, "transformers/paged"),
        # The oldest transformers drops the cache there and goes on with the last token alone.
        ("phi3", RESTARTS, "transformers/cache" if OLDEST else "transformers/paged"),
        ("falcon", STRETCHED, "transformers/rows"),
    ],
)
def test_texts_across_the_original_length_answer_like_transformers(model_type, overrides, tier):
    served_by = assert_matches_transformers(
        model_type, "transformers", overrides=overrides, prompts=PROMPTS, max_tokens=12
    )
    assert served_by == tier


@pytest.mark.parametrize("num_blocks", [64, 16])  # 16 blocks of 4 tokens: texts of 28 tokens are preempted
def test_a_preempted_text_is_rotated_as_before(num_blocks, tmp_path):
    folder = tiny_checkpoint("llama", tmp_path, **STRETCHED)
    prompts = [list(range(3 + number, 15 + number)) for number in range(4)]
    options = {"skip_tokenizer_init": True, "model_impl": "transformers", "block_size": 4}
    params = SamplingParams(temperature=0, max_tokens=16)
    with LLM(model=str(folder), num_blocks=num_blocks, **options) as llm:
        together = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        assert together == [llm.generate([prompt], params)[0].outputs[0].token_ids for prompt in prompts]


def test_no_prefix_is_shared_where_k_depends_on_the_length_of_the_text(tmp_path):
    folder = tiny_checkpoint("llama", tmp_path, **LONG)
    with LLM(model=str(folder), skip_tokenizer_init=True, model_impl="transformers") as llm:
        assert not llm.info.prefix_caching
    # Within the original length nothing depends on it.
    with LLM(model=str(folder), skip_tokenizer_init=True, model_impl="transformers", max_model_len=16) as llm:
        assert llm.info.prefix_caching


class OwnRope(nn.Module):
    """A rope of nobody's type: past 100 tokens it scales by the length, and remembers the longest."""

    def __init__(self):
        super().__init__()
        self.longest = 0

    def forward(self, x, position_ids):
        self.longest = max(self.longest, int(position_ids.max()) + 1)
        return position_ids[..., None].float() * (1 + max(self.longest - 100, 0))


def test_such_a_rope_is_found_by_trying_it():
    model = nn.Sequential()
    model.rope = OwnRope()
    ropes = Ropes(model, 1000)
    assert (ropes.names, ropes.thresholds) == ("rope", {100})
    x = torch.zeros(3, 2, 1)
    positions = torch.tensor([[98, 99], [99, 100], [199, 200]])  # texts of 100, 101 and 201 tokens side by side
    wanted = positions[..., None] * torch.tensor([1.0, 2.0, 102.0])[:, None, None]
    assert torch.equal(model.rope(x, positions), wanted)
    assert model.rope.longest == 0


def test_an_ordinary_rope_is_left_alone(tmp_path):
    import transformers

    folder = tiny_checkpoint("llama", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not Ropes(model, 10_000)
