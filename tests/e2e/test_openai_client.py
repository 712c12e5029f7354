"""The real server and a real model, asked by OpenAI's own client; transformers says what is right."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

PROMPT = "The quick brown fox"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, how are you?"}]


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def expected(reference, ids, count):
    """The text of transformers' own greedy answer."""
    tokenizer, generate = reference
    found = generate(ids, count)
    return tokenizer.decode([one for one in found if one != tokenizer.eos_token_id], skip_special_tokens=True)


def test_the_model_that_is_served_is_listed(client, served):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["tiny-llama"]
    assert client.models.retrieve("tiny-llama").max_model_len == 256
    assert served.announcement.startswith("Serving tiny-llama (native_llama) at http://127.0.0.1:")


def test_a_completion_is_what_transformers_generates(client, reference):
    tokenizer, _ = reference
    answer = client.completions.create(model="tiny-llama", prompt=PROMPT, max_tokens=20, temperature=0)
    assert answer.choices[0].text == expected(reference, tokenizer.encode(PROMPT), 20)
    assert answer.usage.prompt_tokens == len(tokenizer.encode(PROMPT))


def test_a_chat_is_what_transformers_generates(client, reference):
    tokenizer, _ = reference
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    answer = client.chat.completions.create(model="tiny-llama", messages=MESSAGES, max_tokens=20, temperature=0)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert answer.choices[0].message.content == expected(reference, ids, 20)
    assert answer.choices[0].message.role == "assistant"


def test_a_stream_says_the_same_as_the_answer_in_one_piece(client):
    asked = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 30, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert [reason for reason in reasons if reason] == [whole.choices[0].finish_reason]


def test_requests_that_run_together_do_not_change_each_other(client):
    prompts = [f"{count} {PROMPT}" for count in range(8)]

    def ask(prompt):
        return (
            client.completions.create(model="tiny-llama", prompt=prompt, max_tokens=15, temperature=0).choices[0].text
        )

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, prompts)) == alone


def test_a_seed_gives_the_same_samples_again(client):
    asked = {"model": "tiny-llama", "prompt": PROMPT, "max_tokens": 12, "n": 2, "seed": 5, "temperature": 1.5}
    first, again = (client.completions.create(**asked) for _ in range(2))
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    assert first.choices[0].text != first.choices[1].text


def test_logprobs_of_an_echoed_prompt_fit_its_text(client):
    answer = client.completions.create(
        model="tiny-llama", prompt=PROMPT, max_tokens=0, echo=True, logprobs=2, temperature=0
    )
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == PROMPT == answer.choices[0].text
    assert found.token_logprobs[0] is None
    assert all(value < 0 for value in found.token_logprobs[1:])
    assert [PROMPT[start:].startswith(token) for start, token in zip(found.text_offset, found.tokens, strict=True)]


def test_chat_logprobs_of_a_greedy_answer_are_the_best_ones(client):
    answer = client.chat.completions.create(
        model="tiny-llama", messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    for entry in answer.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob


def test_sampling_extras_are_honoured(client, reference):
    tokenizer, _ = reference
    token = tokenizer.encode(" fox")[0]
    extra = {"allowed_token_ids": [token], "ignore_eos": True, "top_k": 1}
    answer = client.completions.create(model="tiny-llama", prompt=PROMPT, max_tokens=3, extra_body=extra)
    assert answer.choices[0].text == tokenizer.decode([token] * 3)
    forced = client.completions.create(model="tiny-llama", prompt=PROMPT, max_tokens=3, logit_bias={str(token): 100})
    assert forced.choices[0].text == tokenizer.decode([token] * 3)


def test_openais_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-9", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny-llama", prompt=PROMPT * 200)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(model="tiny-llama", messages=MESSAGES, tools=[{"type": "function"}])
    assert tools.value.param == "tools"


def test_generate_gives_the_same_tokens(served, reference):
    tokenizer, generate = reference
    ids = tokenizer.encode(PROMPT)
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 10, "temperature": 0}}
    answer = httpx.post(served.url + "/generate", json=body).json()
    assert answer["output_ids"] == generate(ids, 10)


def test_a_second_request_finds_the_first_one_s_prompt_in_the_cache(client):
    asked = {"model": "tiny-llama", "prompt": "Hello, how are you? I am fine, thank you. " * 4, "max_tokens": 1}
    client.completions.create(**asked)
    assert client.completions.create(**asked).usage.prompt_tokens_details.cached_tokens > 0


def test_metrics_show_what_was_served(client, served):
    client.completions.create(model="tiny-llama", prompt=PROMPT, max_tokens=2)
    text = httpx.get(served.url + "/metrics").text
    for name in ("requests_finished_total", "generation_tokens_total", "time_to_first_token_seconds_count"):
        assert f"core_serve_{name}" in text
