"""POST /v1/chat/completions."""

import pytest

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]  # the template makes "user:Hello|" of it


def ask(server, messages=None, **fields):
    response = server.post(PATH, messages=HELLO if messages is None else messages, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def stream(server, events, **fields):
    with server.http.stream("POST", PATH, json={"messages": HELLO, "stream": True, **fields}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return events(response)


def test_an_answer_has_openais_shape(server):
    body = ask(server, model="echo", max_tokens=4)
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "echo"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "user", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 11,
        "completion_tokens": 4,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_n_samples_are_n_choices_and_the_prompt_counts_once(server):
    body = ask(server, n=3, max_tokens=2)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in body["choices"]] == ["us"] * 3
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (11, 6)


def test_a_stop_string_ends_the_answer_and_is_told(server):
    choice = ask(server, stop=[":"])["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("user", "stop", ":")


def test_max_completion_tokens_is_the_new_name_of_max_tokens(server):
    assert ask(server, max_completion_tokens=3)["usage"]["completion_tokens"] == 3


def test_without_a_limit_the_model_s_length_is_the_limit(server):
    assert ask(server)["usage"]["total_tokens"] == 200


def test_text_parts_are_put_together(server):
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    assert ask(server, [{"role": "user", "content": parts}], max_tokens=10)["choices"][0]["message"]["content"] == (
        "user:Hello"
    )


def test_every_role_reaches_the_template_and_developer_means_system(server):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "d", "tool_call_id": "1"},
    ]
    shown = "system:a|system:b|user:c|assistant:|tool:d|"
    assert ask(server, messages, max_tokens=len(shown))["choices"][0]["message"]["content"] == shown


def test_template_options_reach_the_template(server):
    body = ask(server, chat_template_kwargs={"shout": True}, add_generation_prompt=False, max_tokens=12)
    assert body["choices"][0]["message"]["content"] == "user:HELLOus"


def test_logprobs_name_the_chosen_token_and_its_rivals(server):
    content = ask(server, max_tokens=1, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert content == [
        {
            "token": "u",
            "logprob": -1.0,
            "bytes": [117],
            "top_logprobs": [
                {"token": "v", "logprob": -0.5, "bytes": [118]},
                {"token": "u", "logprob": -1.0, "bytes": [117]},
            ],
        }
    ]


def test_logprobs_without_top_logprobs_have_no_rivals(server):
    content = ask(server, max_tokens=2, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [(entry["token"], entry["top_logprobs"]) for entry in content] == [("u", []), ("s", [])]


def test_bytes_of_half_a_character_are_the_token_s_own(server):
    messages = [{"role": "user", "content": "é"}]
    content = ask(server, messages, max_tokens=7, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content[5:]] == [[0xC3], [0xA9]]


def test_prompt_logprobs_come_beside_the_choices(server):
    entries = ask(server, max_tokens=1, prompt_logprobs=1)["prompt_logprobs"]
    assert len(entries) == 11
    assert entries[0] is None
    assert entries[1]["115"] == {"logprob": -1.0, "rank": 2, "decoded_token": "s"}


def test_a_stream_says_the_same_as_the_answer_in_one_piece(server, events):
    found = stream(server, events, max_tokens=5)
    assert found[-1] == "[DONE]"
    chunks = found[:-1]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "user:"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["length"]
    assert all("usage" not in chunk for chunk in chunks)


def test_a_stream_with_usage_ends_with_it(server, events):
    *chunks, last, done = stream(server, events, max_tokens=2, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 13


def test_a_stream_of_n_samples_tells_them_apart(server, events):
    texts = {0: "", 1: ""}
    finished = []
    for chunk in stream(server, events, max_tokens=3, n=2)[:-1]:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
        finished += [choice["index"]] * (choice["finish_reason"] is not None)
    assert texts == {0: "use", 1: "use"}
    assert sorted(finished) == [0, 1]


def test_streamed_logprobs_come_token_by_token(server, events):
    chunks = stream(server, events, max_tokens=3, logprobs=True, top_logprobs=1)[1:-1]
    tokens = [entry["token"] for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]]
    assert tokens == ["u", "s", "e"]


HARMLESS = {
    "tools": [],
    "tool_choice": "none",
    "functions": None,
    "response_format": {"type": "text"},
    "store": False,
    "service_tier": "auto",
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "metadata": {"a": "b"},
    "user": "me",
    "n": 1,
    "best_of": 1,
    "stop": None,
    "logit_bias": {},
    "temperature": None,
    "continue_final_message": False,
    "stream": False,
    "stream_options": None,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_field_that_asks_for_nothing_is_accepted(server, name):
    ask(server, max_tokens=1, **{name: HARMLESS[name]})
