"""Times one engine in this process. Run by run.py, in the environment of that engine: nothing of core at the top.

Reads a job as JSON from stdin: engine, model, threads, new, and prompts by concurrency ("warm" and "timed", token ids).
Prints as its last line {"seconds": {concurrency: seconds of the timed prompts}}, and for `native` the "bound_s" too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Job = dict[str, Any]
Generate = Callable[[list[list[int]], int], list[list[int]]]
WARM_TOKENS = 2


def main() -> None:
    job = json.load(sys.stdin)
    found = ENGINES[job["engine"]](job)
    print(json.dumps(found), flush=True)


def timed(job: Job, generate: Generate) -> dict[str, Any]:
    """Answer the prompts of each concurrency at once, after others that are not timed."""
    seconds = {}
    for count, prompts in job["prompts"].items():
        generate(prompts["warm"], WARM_TOKENS)
        start = time.perf_counter()
        answers = generate(prompts["timed"], job["new"])
        seconds[count] = time.perf_counter() - start
        if [len(answer) for answer in answers] != [job["new"]] * len(prompts["timed"]):
            raise RuntimeError(f"asked for {job['new']} tokens each, got {[len(answer) for answer in answers]}")
    return {"seconds": seconds}


# ------------------------------------------------------------------------------------------------ core-serve


def core_serve(job: Job) -> dict[str, Any]:
    """The engine under `core-serve bench`, with its own driver."""
    from core.bench.offline import run_requests
    from core.bench.roofline import decode_bound, prefill_bound
    from core.bench.subject import opened
    from core.config import EngineConfig
    from core.engine_build import offline
    from core.plugins import PluginHost

    asked = EngineConfig(
        model=job["model"], model_impl=job["engine"], num_threads=job["threads"], skip_tokenizer_init=True
    )
    config = offline(asked)  # as the others: nobody reads along
    seconds, bounds = {}, {}
    with opened(config, PluginHost.load(), max(map(int, job["prompts"]))) as bench:
        costs, ceilings = bench.subject.costs, bench.subject.ceilings
        for count, prompts in job["prompts"].items():
            run_requests(bench.engine, prompts["warm"], WARM_TOKENS, int(count))
            run = run_requests(bench.engine, prompts["timed"], job["new"], int(count))
            seconds[count] = run.seconds
            decode = sum(decode_bound(step, costs, ceilings) for step in run.steps if step.decodes)
            bounds[count] = decode + prefill_bound(run.steps, list(map(len, prompts["timed"])), costs, ceilings)
        machine = {"gflops": ceilings.gflops, "read_gb_s": ceilings.read_gb_s, "served": bench.subject.impl_name}
    return {"seconds": seconds, "bound_s": bounds, **machine}


# ------------------------------------------------------------------------------------------------ peers


def transformers_generate(job: Job) -> dict[str, Any]:
    """transformers' own module in float32, with the weights that core-serve's checkpoint opens."""
    import torch

    torch.set_num_threads(job["threads"])
    model = _plain(job["model"])

    def generate(ids: list[list[int]], new: int) -> list[list[int]]:
        batch = torch.tensor(ids)
        lengths = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            out = model.generate(batch, attention_mask=torch.ones_like(batch), **lengths)
        return out[:, batch.shape[1] :].tolist()

    return timed(job, generate)


def _plain(path: str) -> Any:
    import torch

    from core.config import EngineConfig
    from core.plain_module import plain_module
    from core.plugins import PluginHost

    host, config = PluginHost.load(), EngineConfig(model=path)
    checkpoint = host.open_checkpoint(path, config)
    return plain_module(checkpoint, torch.float32, method=host.quant_method(checkpoint.spec, config))


def vllm(job: Job) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    counts = list(map(int, job["prompts"]))
    sizes = {"max_num_seqs": max(counts), "max_model_len": job["max_len"]}
    # On a CPU that is the share of its memory, and the default is more than a machine mostly has free.
    llm = LLM(model=job["model"], dtype="float32", gpu_memory_utilization=0.5, **sizes)

    def generate(ids: list[list[int]], new: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        answers = llm.generate([{"prompt_token_ids": prompt} for prompt in ids], params, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    return timed(job, generate)


def llamacpp(job: Job) -> dict[str, Any]:
    """llama.cpp by its low-level API, which is where it batches: a sequence a prompt, the likeliest token each."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(job["model"].encode(), llama_cpp.llama_model_default_params())
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    most = max(map(int, job["prompts"]))
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.n_batch = most * job["max_len"], most, most * job["max_len"]
    params.n_threads = params.n_threads_batch = job["threads"]
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp cannot open {job['model']}")

    def decode(rows: list[tuple[int, int, int, bool]]) -> None:
        """Run (token, position, sequence, whether its logits are wanted)."""
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for at, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[at], batch.pos[at], batch.logits[at] = token, position, wanted
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_batch_free(batch)

    def likeliest(row: int) -> int:
        import numpy

        return int(numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, row), (width,)).argmax())

    def generate(ids: list[list[int]], new: int) -> list[list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        length = len(ids[0])
        decode([(t, at, s, at == length - 1) for s, prompt in enumerate(ids) for at, t in enumerate(prompt)])
        rows = [(sequence + 1) * length - 1 for sequence in range(len(ids))]
        answers: list[list[int]] = [[] for _ in ids]
        for step in range(new):
            for answer, row in zip(answers, rows, strict=True):
                answer.append(likeliest(row))
            if step < new - 1:
                decode([(answer[-1], length + step, sequence, True) for sequence, answer in enumerate(answers)])
                rows = list(range(len(ids)))
        return answers

    return timed(job, generate)


ENGINES: dict[str, Callable[[Job], dict[str, Any]]] = {
    "native": core_serve,
    "transformers": core_serve,
    "generate": transformers_generate,
    "vllm": vllm,
    "llamacpp": llamacpp,
}

if __name__ == "__main__":
    main()
