"""Two hundred streams at once, a third of them broken off: the others are right, and nothing is left behind."""

import asyncio
import random
import time

import httpx
import openai
import psutil

REQUESTS, SEED = 200, 7
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "hello", "how", "are", "you", "fine"]


def test_two_hundred_streams_of_which_a_third_disconnect(served, reference):
    asks = make_asks(random.Random(SEED), reference[0])
    wanted = expected_texts(asks, reference)
    asyncio.run(run_all(served.url, asks))  # warm-up: pools, caches and threads take their memory once
    before = memory(served)
    found = asyncio.run(run_all(served.url, asks))
    for ask, text in zip(asks, found, strict=True):
        if ask["leaves_after"] is None:
            assert text == wanted[ask["number"]], ask
        else:
            assert wanted[ask["number"]].startswith(text), ask
    wait_until_idle(served.url)
    assert gauge(served.url, "core_serve_blocks_free") == gauge(served.url, "core_serve_blocks_total")
    assert memory(served) - before < 64 * 2**20


def make_asks(source, tokenizer):
    """Prompts of 1 to 40 words, answers of 1 to 30 tokens; every third client leaves after a few pieces of text."""
    asks = []
    for number in range(REQUESTS):
        ids = tokenizer.encode(" ".join(source.choices(WORDS, k=source.randint(1, 40))))
        leaves_after = source.randint(0, 5) if number % 3 == 0 else None
        asks.append({"number": number, "ids": ids, "count": source.randint(1, 30), "leaves_after": leaves_after})
    return asks


def expected_texts(asks, reference):
    tokenizer, generate = reference
    texts = []
    for ask in asks:
        found = generate(ask["ids"], ask["count"])
        texts.append(tokenizer.decode(found, skip_special_tokens=True))
    return texts


async def run_all(url, asks):
    limits = httpx.Limits(max_connections=REQUESTS)
    async with (
        httpx.AsyncClient(limits=limits, timeout=120) as transport,
        openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, http_client=transport) as client,
    ):
        return await asyncio.gather(*(run_one(client, ask) for ask in asks))


async def run_one(client, ask):
    stream = await client.completions.create(
        model="tiny-llama", prompt=ask["ids"], max_tokens=ask["count"], temperature=0, stream=True
    )
    text, pieces = "", 0
    async with stream:
        async for chunk in stream:
            if ask["leaves_after"] is not None and pieces >= ask["leaves_after"]:
                break
            text += chunk.choices[0].text
            pieces += 1
    return text


def wait_until_idle(url, limit=30.0):
    deadline = time.monotonic() + limit
    while gauge(url, "core_serve_requests_running") + gauge(url, "core_serve_requests_waiting") > 0:
        assert time.monotonic() < deadline, "requests that nobody waits for are still running"
        time.sleep(0.05)


def gauge(url, name):
    for line in httpx.get(url + "/metrics").text.splitlines():
        if line.startswith(name + " "):
            return float(line.split()[1])
    raise AssertionError(f"/metrics has no {name}")


def memory(served):
    """Resident bytes of the server and its engine."""
    process = psutil.Process(served.process.pid)
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
