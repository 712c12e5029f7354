"""POST /v1/completions."""

PATH = "/v1/completions"


def ask(server, prompt, **fields):
    response = server.post(PATH, prompt=prompt, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def texts(body):
    return [choice["text"] for choice in body["choices"]]


def stream(server, events, **fields):
    with server.http.stream("POST", PATH, json={"stream": True, **fields}) as response:
        assert response.status_code == 200
        return events(response)


def test_an_answer_has_openais_shape(server):
    body = ask(server, "abc", max_tokens=5)
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [
        {"index": 0, "text": "abcab", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert body["usage"]["total_tokens"] == 8


def test_sixteen_tokens_are_the_default_as_openais(server):
    assert ask(server, "abc")["usage"]["completion_tokens"] == 16


def test_a_prompt_comes_as_text_as_ids_or_as_a_list_of_either(server):
    assert texts(ask(server, "abc", max_tokens=3)) == ["abc"]
    assert texts(ask(server, [97, 98], max_tokens=3)) == ["aba"]
    assert texts(ask(server, ["ab", "xyz"], max_tokens=3)) == ["aba", "xyz"]
    assert texts(ask(server, [[97], [98, 99]], max_tokens=2)) == ["aa", "bc"]


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(server):
    body = ask(server, ["ab", "xy"], n=2, max_tokens=2)
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "ab"), (1, "ab"), (2, "xy"), (3, "xy"),
    ]  # fmt: skip
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (4, 8)


def test_echo_puts_the_prompt_before_the_answer(server):
    assert texts(ask(server, ["ab", "xy"], echo=True, max_tokens=1)) == ["aba", "xyx"]
    assert texts(ask(server, [97, 98], echo=True, max_tokens=1)) == ["aba"]


def test_logprobs_have_the_completion_api_s_own_shape(server):
    found = ask(server, "abc", max_tokens=2, logprobs=1)["choices"][0]["logprobs"]
    assert found == {
        "tokens": ["a", "b"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{"b": -0.5, "a": -1.0}, {"c": -0.5, "b": -1.0}],
        "text_offset": [0, 1],
    }


def test_parts_of_a_character_are_named_by_their_bytes(server):
    found = ask(server, "é", max_tokens=2, logprobs=0)["choices"][0]["logprobs"]
    assert found["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_echo_with_logprobs_tells_of_the_prompt_too(server):
    found = ask(server, "abc", max_tokens=1, echo=True, logprobs=1)["choices"][0]["logprobs"]
    assert found["tokens"] == ["a", "b", "c", "a"]
    assert found["token_logprobs"] == [None, -1.0, -1.0, -1.0]
    assert found["top_logprobs"][0] is None
    assert found["text_offset"] == [0, 1, 2, 3]


def test_a_prompt_can_be_scored_without_generating(server):
    body = ask(server, "abc", max_tokens=0, echo=True, logprobs=0)
    choice = body["choices"][0]
    assert choice["text"] == "abc"
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -1.0]
    assert choice["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_stand_in_each_choice(server):
    body = ask(server, ["ab", "xyz"], max_tokens=1, prompt_logprobs=0)
    assert [len(choice["prompt_logprobs"]) for choice in body["choices"]] == [2, 3]


def test_end_of_text_is_a_stop_without_a_stop_reason(server):
    choice = ask(server, "ab.", max_tokens=9)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", None)
    assert ask(server, "ab.", max_tokens=9, ignore_eos=True)["choices"][0]["text"] == "ab.ab.ab."


def test_a_stream_of_several_prompts_says_the_same_as_the_whole(server, events):
    *chunks, done = stream(server, events, prompt=["ab", "xyz"], max_tokens=4, n=2)
    assert done == "[DONE]"
    found = {}
    for chunk in chunks:
        choice = chunk["choices"][0]
        found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    assert found == {0: "abab", 1: "abab", 2: "xyzx", 3: "xyzx"}


def test_a_streamed_echo_comes_first_with_its_logprobs(server, events):
    chunks = stream(server, events, prompt="abc", max_tokens=2, echo=True, logprobs=0)[:-1]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["abca", "b"]
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0, 1, 2, 3], [4]]


def test_a_streamed_score_generates_nothing(server, events):
    options = {"include_usage": True}
    chunk, last, _ = stream(server, events, prompt="abc", max_tokens=0, echo=True, stream_options=options)
    assert (chunk["choices"][0]["text"], chunk["choices"][0]["finish_reason"]) == ("abc", "length")
    assert last["usage"]["completion_tokens"] == 0
