"""Speculation changes how many tokens a step gives, and no token: the same requests with and without it."""

import random

import pytest

from core import LLM, SamplingParams
from core.contracts import StepStats
from core.testing import tiny_checkpoint

SPECULATION = {"speculative_ngram": 3, "speculative_ngram_min": 1}
TIGHT = {"block_size": 4, "max_num_batched_tokens": 16, "max_num_seqs": 4, "max_model_len": 120}
MODELS = [
    ("llama", "native"),
    ("llama", "transformers"),
    ("mistral", "native"),
    ("mistral", "transformers"),
    ("gemma3_text", "transformers"),
]


def prompts(lengths=(50, 3, 31, 1, 17, 64, 16, 9)):
    """Texts that repeat themselves after a third; the first and the last begin alike."""
    draw = random.Random(1)
    made = []
    for length in lengths:
        third = [draw.randrange(3, 90) for _ in range(max(1, length // 3))]
        made.append((third * 4)[:length])
    return [*made, made[0][:21] + made[1]]


def params(**changes):
    return SamplingParams(**{"temperature": 0, "max_tokens": 30, "ignore_eos": True, **changes})


def opened(folder, **options):
    tokenizer = {} if "skip_tokenizer_init" in options else {"skip_tokenizer_init": True}
    llm = LLM(str(folder), device="cpu", **tokenizer, **options)
    llm._engine.take_stats()
    return llm


def steps(llm):
    return [one for one in llm._engine.take_stats() if isinstance(one, StepStats)]


def told(outputs):
    """All that a client sees but logprobs."""
    return [(one.text, one.token_ids, one.finish_reason, one.stop_reason) for all in outputs for one in all.outputs]


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def pair(request, tmp_path_factory):
    """Return (LLM without, LLM with speculation) of one model."""
    model_type, model_impl = request.param
    folder = tiny_checkpoint(model_type, tmp_path_factory.mktemp("model"))
    made = [opened(folder, model_impl=model_impl, **TIGHT, **options) for options in ({}, SPECULATION)]
    yield made
    for llm in made:
        assert llm._engine.scheduler.pool.num_used == 0
        assert all(window.num_free == window.num_blocks for window in llm._engine.scheduler.windows)
        llm.close()


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.3, "seed": 6, "top_k": 8, "top_p": 0.9}, {"n": 3}],
    ids=["greedy", "sampled", "filtered", "several"],
)
def test_many_requests_of_mixed_lengths_get_the_same_tokens_cold_and_warm(pair, changes):
    answers = []
    for llm in pair:
        llm.reset_prefix_cache()
        answers.append([told(llm.generate(prompts(), params(**changes))) for _ in range(2)])
    (plain, plain_warm), (drafted, drafted_warm) = answers
    assert drafted == plain
    assert drafted_warm == plain_warm == plain


def test_a_repeating_text_has_guesses_that_are_right_and_fewer_steps(pair):
    texts, counts = prompts(), []
    for llm in pair:
        steps(llm)
        llm.generate(texts, params())
        counts.append(steps(llm))
    without, speculating = counts
    drafted, accepted = (sum(getattr(one, name) for one in speculating) for name in ("num_drafted", "num_accepted"))
    assert 0 < accepted < drafted
    assert len(speculating) < len(without)
    assert sum(one.num_drafted for one in without) == 0
    assert all(one.num_tokens <= 16 for one in speculating), "drafts went over the token budget"


def test_logprobs_of_a_run_are_those_of_single_steps(pair):
    plain, drafted = (llm.generate(prompts(), params(logprobs=3)) for llm in pair)
    for one, other in zip(plain, drafted, strict=True):
        wanted, found = one.outputs[0].logprobs, other.outputs[0].logprobs
        assert len(found) == len(wanted) == 30
        for left, right in zip(wanted, found, strict=True):
            chosen = next(iter(left))
            assert next(iter(right)) == chosen
            assert right[chosen].logprob == pytest.approx(left[chosen].logprob, abs=1e-3)


@pytest.mark.parametrize(("model_type", "model_impl"), [("llama", "native"), ("gemma3_text", "transformers")])
def test_few_blocks_preempt_and_change_no_token(tmp_path, model_type, model_impl):
    folder = tiny_checkpoint(model_type, tmp_path)
    answers = []
    for options in ({}, SPECULATION):
        with opened(folder, model_impl=model_impl, **TIGHT, num_blocks=26, **options) as llm:
            answers.append(told(llm.generate(prompts(), params())))
            taken = steps(llm)
            assert sum(one.num_preempted for one in taken) > 0
            assert llm._engine.scheduler.pool.num_used == 0
    assert answers[0] == answers[1]
    assert sum(one.num_accepted for one in taken) > 0


def test_penalties_and_bans_go_without_guesses_and_get_the_same_tokens(pair):
    asked = [
        params(repetition_penalty=1.3),
        params(presence_penalty=1.0, frequency_penalty=0.5),
        params(min_tokens=10, stop_token_ids=list(range(3, 60))),
        params(logit_bias={7: 5.0}, allowed_token_ids=list(range(40))),
    ]
    plain, drafted = (told(llm.generate(prompts()[:4], asked)) for llm in pair)
    assert plain == drafted


# ---------------------------------------------------------------------------------------------- ends within a run


@pytest.fixture(scope="module")
def texts(tiny_llama, tmp_path_factory):
    """Return (LLM without, LLM with speculation, prompt) of a model with a tokenizer that goes on in a loop.

    Its attention gives nothing, so that the next token is a function of the last one alone; the prompt holds its loop.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("looping")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    model.save_pretrained(folder)
    made = [opened(folder, skip_tokenizer_init=False, **options) for options in ({}, SPECULATION)]
    start = made[0].tokenizer.encode("fox jumps over")
    loop = made[0].generate(start, params(max_tokens=100))[0].outputs[0].token_ids
    yield *made, start + loop
    for llm in made:
        llm.close()


def test_a_stop_token_ends_a_run_where_it_stands(texts):
    plain, drafted, prompt = texts
    whole = plain.generate(prompt, params(max_tokens=40))[0].outputs[0].token_ids
    for token in dict.fromkeys(whole):
        for changes in ({}, {"min_tokens": 7}):
            asked = params(max_tokens=40, stop_token_ids=[token], **changes)
            assert told(drafted.generate(prompt, asked)) == told(plain.generate(prompt, asked))


def test_every_max_tokens_gives_exactly_so_many(texts):
    plain, drafted, prompt = texts
    whole = plain.generate(prompt, params(max_tokens=24))[0].outputs[0].token_ids
    for count in range(1, 25):
        (found,) = drafted.generate(prompt, params(max_tokens=count))[0].outputs
        assert (found.token_ids, found.finish_reason) == (whole[:count], "length")
    assert sum(one.num_accepted for one in steps(drafted)) > 100, "no run was cut"


@pytest.mark.parametrize("included", [False, True])
def test_a_stop_string_ends_a_run_where_it_stands(texts, included):
    plain, drafted, prompt = texts
    whole = plain.generate(prompt, params(max_tokens=40))[0].outputs[0].text
    for start in range(0, len(whole) - 3, 5):
        asked = params(max_tokens=40, stop=[whole[start : start + 3]], include_stop_str_in_output=included, logprobs=0)
        one, other = plain.generate(prompt, asked), drafted.generate(prompt, asked)
        assert told(other) == told(one)
        assert len(other[0].outputs[0].logprobs) == len(other[0].outputs[0].token_ids)


def test_a_stream_says_the_same_in_fewer_deltas(texts):
    plain, drafted, prompt = texts
    streams = [list(llm.stream(prompt, params(max_tokens=40))) for llm in (plain, drafted)]
    one, other = (
        ("".join(delta.text for delta in deltas), sum(len(d.token_ids) for d in deltas)) for deltas in streams
    )
    assert one == other
    assert len(streams[1]) < len(streams[0]) / 2
