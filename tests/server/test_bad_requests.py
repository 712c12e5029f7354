"""Every bad request is an HTTP error in OpenAI's shape that names the field at fault."""

import json

import httpx
import pytest

CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"
USER = [{"role": "user", "content": "Hi"}]


def fails(response, status, param=None, code=None):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    if param is not None:
        assert error["param"] == param or error["param"].startswith((f"{param}[", f"{param}."))
    if code is not None:
        assert error["code"] == code
    return error


def message(content, **others):
    return {"messages": [{"role": "user", "content": content, **others}]}


BAD_CHAT = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "pirate", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [*USER, {"role": "user"}]}, "messages[1].content"),
    (message(5), "messages[0].content"),
    (message([{"type": "image_url", "image_url": {"url": "x"}}]), "messages[0].content[0]"),
    (message([{"type": "text"}]), "messages[0].content[0]"),
    (message(["x"]), "messages[0].content[0]"),
    (message("x", tool_calls=[{"function": {"name": "f", "arguments": "no json"}}]), "messages[0].tool_calls[0]"),
    (message("x", colour="red"), "messages[0].colour"),
]

BAD_FIELDS = [
    ("temperature", -1),
    ("temperature", "0.5"),
    ("temperature", True),
    ("temperature", 1e999),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_k", -5),
    ("top_k", 10**12),
    ("top_k", 2.5),
    ("min_p", 2),
    ("repetition_penalty", 0),
    ("presence_penalty", 3),
    ("frequency_penalty", -3),
    ("seed", 10**30),
    ("seed", "x"),
    ("n", 0),
    ("n", 1000),
    ("stop", {"a": 1}),
    ("stop", [""]),
    ("stop", "§"),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [260]),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [9999]),
    ("bad_words", [1]),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"9999": 1}),
    ("logit_bias", {"5": 1000}),
    ("logit_bias", [1]),
    ("min_tokens", -1),
    ("ignore_eos", "yes"),
    ("priority", 10**12),
    ("user", 5),
    ("stream", "true"),
    ("stream_options", {"include_usage": True}),  # without stream
    ("prompt_logprobs", 1000),
    ("max_tokens", -1),
    ("max_tokens", "many"),
    ("max_tokens", 1.5),
    ("logits_processors", ["x"]),
    ("store", True),
    ("temprature", 1),
]

BAD_CHAT_FIELDS = [
    ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ("tool_choice", "required"),
    ("functions", [{"name": "f"}]),
    ("response_format", {"type": "json_object"}),
    ("audio", {"voice": "x"}),
    ("modalities", ["text", "audio"]),
    ("reasoning_effort", "high"),
    ("continue_final_message", True),
    ("best_of", 2),
    ("echo", True),
    ("top_logprobs", 3),  # without logprobs
    ("logprobs", 3),
    ("max_completion_tokens", 0),
    ("chat_template_kwargs", [1]),
]

BAD_TEXT_FIELDS = [
    ("prompt", None),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [""]),
    ("prompt", [[]]),
    ("prompt", ["a", []]),
    ("prompt", ["a", 1]),
    ("prompt", [[1], "a"]),
    ("prompt", [-1]),
    ("prompt", [260]),
    ("prompt", [10**30]),
    ("prompt", [True]),
    ("prompt", [1.5]),
    ("prompt", {"a": 1}),
    ("prompt", 7),
    ("max_tokens", 0),  # without echo
    ("logprobs", True),
    ("logprobs", -1),
    ("logprobs", 101),
    ("best_of", 3),
    ("suffix", "x"),
    ("tools", []),
]

BAD_NATIVE = [
    ({}, "text"),
    ({"text": "a", "input_ids": [1]}, "text"),
    ({"text": ""}, "text"),
    ({"text": [1]}, "text"),
    ({"input_ids": "a"}, "input_ids"),
    ({"input_ids": [999]}, "input_ids"),
    ({"text": "a" * 300}, "text"),
    ({"text": "a", "sampling_params": 5}, "sampling_params"),
    ({"text": "a", "sampling_params": [{}, {}]}, "sampling_params"),
    ({"text": "a", "sampling_params": {"max_tokens": 5}}, "sampling_params.max_tokens"),
    ({"text": "a", "sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
    ({"text": "a", "sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
    ({"text": "a", "sampling_params": {"temperature": "x"}}, "sampling_params.temperature"),
    ({"text": "a", "sampling_params": {"regex": "a+"}}, "sampling_params.regex"),
    ({"text": "a", "return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num"),
    ({"text": "a", "image_data": ["x"]}, "image_data"),
    ({"text": "a", "speed": 5}, "speed"),
]


@pytest.mark.parametrize(("body", "param"), BAD_CHAT)
def test_bad_messages_are_named(server, body, param):
    assert fails(server.post(CHAT, **body), 400)["param"].startswith(param)


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS + BAD_CHAT_FIELDS)
def test_a_bad_chat_field_is_named(server, name, value):
    response = server.http.post(CHAT, content=dumped({"messages": USER, name: value}), headers=JSON)
    fails(response, 400, name)


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS + BAD_TEXT_FIELDS)
def test_a_bad_completion_field_is_named(server, name, value):
    response = server.http.post(TEXT, content=dumped({"prompt": "a", name: value}), headers=JSON)
    fails(response, 400, name)


@pytest.mark.parametrize(("body", "param"), BAD_NATIVE)
def test_a_bad_generate_field_is_named(server, body, param):
    fails(server.post(NATIVE, **body), 400, param)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_refused(server, literal):
    content = f'{{"prompt": "a", "temperature": {literal}}}'
    fails(server.http.post(TEXT, content=content, headers=JSON), 400, "temperature")


@pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"x"', b"5", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 5000, b"{}x"]
)
def test_a_body_that_is_no_json_object_is_refused(server, path, content):
    fails(server.http.post(path, content=content, headers=JSON), 400)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_another_content_type_is_refused(server, kind):
    headers = {} if kind is None else {"content-type": kind}
    fails(server.http.post(TEXT, content=b'{"prompt": "a"}', headers=headers), 415, code="unsupported_media_type")


def test_json_with_a_charset_is_taken(server):
    headers = {"content-type": "application/json; charset=utf-8"}
    assert server.http.post(TEXT, content=b'{"prompt": "a"}', headers=headers).status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize"])
def test_an_unknown_model_is_not_found(server, path):
    body = {"prompt": "a"} if path != CHAT else {"messages": USER}
    fails(server.post(path, model="gpt-9", **body), 404, "model", "model_not_found")
    fails(server.http.get("/v1/models/gpt-9"), 404, "model", "model_not_found")


def test_an_unknown_path_and_a_wrong_method_are_told(server):
    fails(server.http.get("/v1/nothing"), 404, code="unknown_url")
    fails(server.http.get(TEXT), 405, code="method_not_allowed")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses"])
def test_what_is_not_there_yet_says_so(server, path):
    response = server.post(path, input="x")
    assert path in fails(response, 501, code="not_supported")["message"]
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_a_status_also_for_a_stream(server, stream):
    fails(server.post(TEXT, prompt="a" * 201, stream=stream), 400, "prompt", "context_length_exceeded")
    fails(server.post(TEXT, prompt="a" * 150, max_tokens=100, stream=stream), 400, "prompt", "context_length_exceeded")
    fails(server.post(CHAT, messages=[{"role": "user", "content": "a" * 199}]), 400, "messages")


def test_what_the_engine_refuses_is_a_status_also_for_a_stream(server):
    fails(server.post(TEXT, prompt="FULL", stream=True), 503, code="overloaded")
    fails(server.post(TEXT, prompt="BUG", stream=True), 500)
    assert server.post(TEXT, prompt="fine").status_code == 200


def test_one_refused_prompt_of_several_refuses_the_body_and_aborts_the_others(server):
    fails(server.post(TEXT, prompt=["a", "FULL", "b"], stream=True), 503, code="overloaded")
    server.wait_for(lambda: server.metric("requests_running") == 0, "nothing runs")
    assert server.call(lambda: server.client.num_open) == 0


def test_a_sample_that_fails_is_an_error_of_its_own_body_only(server, events):
    assert "no usable logits" in fails(server.post(TEXT, prompt="NAN"), 500)["message"]
    with server.http.stream("POST", TEXT, json={"prompt": "NAN", "stream": True}) as response:
        # A failure that comes before the first piece of text still gets a status of its own.
        found = events(response)[-1] if response.status_code == 200 else json.loads(response.read())
    assert "no usable logits" in found["error"]["message"]
    assert server.health() == 200


def test_prompt_logprobs_cannot_be_streamed(server):
    fails(server.post(TEXT, prompt="a", prompt_logprobs=1, stream=True), 400, "prompt_logprobs")


def test_max_tokens_and_max_completion_tokens_must_agree(server):
    fails(server.post(CHAT, messages=USER, max_tokens=1, max_completion_tokens=2), 400, "max_completion_tokens")


@pytest.mark.parametrize("tokens", [[-1], [260], [10**30], ["a"], [True], "abc", None])
def test_detokenize_refuses_what_is_no_token(server, tokens):
    assert fails(server.post("/detokenize", tokens=tokens), 400)["param"].startswith("tokens")


def test_a_typo_gets_a_hint(server):
    response = server.post(TEXT, prompt="a", temprature=1)
    assert "Did you mean 'temperature'?" in fails(response, 400, "temprature")["message"]


def test_a_body_above_the_limit_is_refused_with_and_without_its_length(start):
    server = start(http={"max_request_bytes": 100}).wait_ready()
    big = b'{"prompt": "%s"}' % (b"a" * 200)
    fails(server.http.post(TEXT, content=big, headers=JSON), 413, code="request_too_large")
    fails(server.http.post(TEXT, content=iter([big[:50], big[50:]]), headers=JSON), 413, code="request_too_large")
    assert server.post(TEXT, prompt="a").status_code == 200


def test_without_a_tokenizer_ids_are_served_and_texts_refused(start):
    server = start(tokenizer=False).wait_ready()
    assert server.post(TEXT, prompt=[97, 98], max_tokens=1).status_code == 200
    fails(server.post(TEXT, prompt="a"), 400, "prompt")
    fails(server.post(CHAT, messages=USER), 400, "messages")
    assert server.post(NATIVE, input_ids=[97]).json()["output_ids"][0] == 97


JSON = {"content-type": "application/json"}


def dumped(body):
    """As json.dumps, which httpx would not let write 1e999."""
    import json

    return json.dumps(body).replace("Infinity", "1e999")


def test_the_raw_socket_gets_an_answer_too(server):
    assert httpx.post(f"{server.service.url}{TEXT}", content=b"", headers=JSON).status_code == 400
