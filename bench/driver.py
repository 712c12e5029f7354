"""Times one engine in this process and prints {concurrency: output tokens a second} as its last line. Run by run.py."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int], list[list[int]]]


def main(job: dict[str, Any]) -> None:
    counts = [int(count) for count in job["concurrency"].split(",")]
    generate = hugging_face(job) if job["engine"] == "generate" else core_serve(job, max(counts))
    source = random.Random(0)
    speeds = {}
    for count in counts:
        timed(generate, prompts(source, count, job["prompt_len"]), 2)  # warm-up
        speeds[count] = count * job["new"] / timed(generate, prompts(source, count, job["prompt_len"]), job["new"])
    print(json.dumps({count: round(speed, 2) for count, speed in speeds.items()}), flush=True)


def prompts(source: random.Random, count: int, length: int) -> list[list[int]]:
    return [source.choices(range(1000, 30_000), k=length) for _ in range(count)]


def timed(generate: Generate, ids: list[list[int]], new: int) -> float:
    start = time.perf_counter()
    answers = generate(ids, new)
    seconds = time.perf_counter() - start
    if [len(answer) for answer in answers] != [new] * len(ids):
        raise RuntimeError(f"asked for {len(ids)} answers of {new} tokens, got {[len(answer) for answer in answers]}")
    return seconds


def core_serve(job: dict[str, Any], max_requests: int) -> Generate:
    from core import LLM, SamplingParams

    impl = {"native": "native", "transformers": "transformers"}[job["engine"]]
    llm = LLM(model=job["model"], model_impl=impl, dtype="float32", max_num_seqs=max_requests, max_model_len=2048)

    def generate(ids: list[list[int]], new: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        return [answer.outputs[0].token_ids for answer in llm.generate(ids, params)]

    return generate


def hugging_face(job: dict[str, Any]) -> Generate:
    """transformers' own module, with the weights that core-serve's checkpoint opens."""
    import torch

    model = load_plain(job["model"])

    def generate(ids: list[list[int]], new: int) -> list[list[int]]:
        batch = torch.tensor(ids)
        with torch.inference_mode():
            out = model.generate(
                batch, attention_mask=torch.ones_like(batch), max_new_tokens=new, min_new_tokens=new, do_sample=False
            )
        return out[:, batch.shape[1] :].tolist()

    return generate


def load_plain(path: str | None) -> Any:
    import transformers

    from core.config import EngineConfig
    from core.demo import demo_model_path
    from core.plugins import PluginHost

    checkpoint = PluginHost.load().open_checkpoint(path or demo_model_path(), EngineConfig(model=path))
    spec = checkpoint.spec
    config = transformers.AutoConfig.for_model(**spec.config)
    state = dict(checkpoint.tensors())
    model = transformers.AutoModelForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype="float32")
    return model.eval()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
