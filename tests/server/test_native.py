"""/generate, /tokenize, /detokenize, and what a server tells of itself."""

import core


def generate(server, **body):
    response = server.post("/generate", **body)
    assert response.status_code == 200, response.text
    return response.json()


def test_generate_answers_one_text_with_one_object(server):
    body = generate(server, text="abc", sampling_params={"max_new_tokens": 4, "temperature": 0})
    assert (body["text"], body["output_ids"]) == ("abca", [97, 98, 99, 97])
    meta = body["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 4}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (3, 4, 2)


def test_generate_answers_a_batch_with_a_list(server):
    params = [{"max_new_tokens": 1}, {"max_new_tokens": 2}]
    body = generate(server, input_ids=[[97, 98], [99]], sampling_params=params)
    assert [one["text"] for one in body] == ["a", "cc"]
    assert [one["text"] for one in generate(server, text=["ab"], sampling_params={"max_new_tokens": 1})] == ["a"]


def test_generate_tells_what_matched(server):
    body = generate(server, text="abc", sampling_params={"stop": "b"})
    assert body["meta_info"]["finish_reason"] == {"type": "stop", "matched": "b"}
    assert generate(server, text="ab.")["meta_info"]["finish_reason"] == {"type": "stop", "matched": 256}


def test_generate_takes_its_own_names_of_parameters(server):
    params = {"max_new_tokens": 2, "min_new_tokens": 1, "no_stop_trim": True, "sampling_seed": 3, "top_k": -1}
    assert generate(server, text="abc", sampling_params=params)["text"] == "ab"


def test_a_streamed_generate_repeats_the_text_so_far(server, events):
    body = {"text": "abc", "sampling_params": {"max_new_tokens": 3}, "stream": True}
    with server.http.stream("POST", "/generate", json=body) as response:
        *found, done = events(response)
    assert [one["text"] for one in found] == ["a", "ab", "abc"]
    assert found[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 3}
    assert done == "[DONE]"


def test_a_streamed_batch_says_which_one_moved(server, events):
    body = {"text": ["ab", "xy"], "sampling_params": {"max_new_tokens": 2}, "stream": True}
    with server.http.stream("POST", "/generate", json=body) as response:
        found = events(response)[:-1]
    assert {one["index"]: one["text"] for one in found} == {0: "ab", 1: "xy"}


def test_generate_gives_logprobs_of_answer_and_prompt(server):
    meta = generate(
        server,
        text="abc",
        sampling_params={"max_new_tokens": 1},
        return_logprob=True,
        logprob_start_len=1,
        top_logprobs_num=1,
        return_text_in_logprobs=True,
    )["meta_info"]
    assert meta["output_token_logprobs"] == [[-1.0, 97, "a"]]
    assert meta["output_top_logprobs"] == [[[-0.5, 98, "b"]]]
    assert meta["input_token_logprobs"] == [[-1.0, 98, "b"], [-1.0, 99, "c"]]


def test_tokenize_and_detokenize_undo_each_other(server):
    body = server.post("/tokenize", prompt="aé", return_token_strs=True).json()
    assert body == {
        "count": 3,
        "max_model_len": 200,
        "tokens": [97, 0xC3, 0xA9],
        "token_strs": ["<0x61>", "<0xC3>", "<0xA9>"],
    }
    assert server.post("/detokenize", tokens=body["tokens"]).json() == {"prompt": "aé"}


def test_tokenize_renders_messages_as_chat_does(server):
    body = server.post("/tokenize", messages=[{"role": "user", "content": "x"}]).json()
    assert bytes(body["tokens"]) == b"user:x|"


def test_models_tell_what_serves_them(server):
    entry = server.http.get("/v1/models").json()["data"][0]
    assert (entry["id"], entry["impl"], entry["attention"], entry["max_model_len"]) == ("echo", "standin", "none", 200)
    assert server.http.get("/v1/models/echo").json() == entry


def test_version_and_flush_cache_answer(server):
    assert server.http.get("/version").json() == {"version": core.__version__}
    assert server.post("/flush_cache").json() == {"status": "ok"}


def test_metrics_count_tokens_and_ends(server):
    before = {name: server.metric(name) for name in ("prompt_tokens_total", "generation_tokens_total", "steps_total")}
    finished = server.metric('requests_finished_total{reason="length"}')
    server.post("/v1/completions", prompt="abc", max_tokens=5, n=2)
    server.wait_for(lambda: server.metric('requests_finished_total{reason="length"}') == finished + 2, "both ended")
    assert server.metric("prompt_tokens_total") == before["prompt_tokens_total"] + 3
    assert server.metric("generation_tokens_total") == before["generation_tokens_total"] + 10
    assert server.metric("steps_total") == before["steps_total"] + 5  # and none while idle
    assert server.metric("requests_running") == 0
    assert server.metric("blocks_total") == 10
    assert server.metric("engine_ready") == 1
    assert server.metric("inter_token_seconds_count") >= 8
