"""Texts through the real engine: its scheduler cuts prompts into chunks and mixes them with decoding, its runner runs
them, and every token that would be sampled is replaced by the text's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from core.engine import Engine
from core.request import ClientRequest, FinishReason, Request, ScheduledTokens
from core.sampling_params import SamplingParams
from core.schedule import Schedule
from core.verify_layers import LayerRecorder

DECODED = (4, 1)  # tokens at a text's end that are decoded one by one, text after text in turn
Take = Callable[[int, int, Tensor, list[Tensor] | None], None]  # text, first position, logits [rows, vocab], hidden


class ForcedRun:
    """Runs known texts through an engine that has nothing else to do."""

    def __init__(self, engine: Engine, recorder: LayerRecorder | None, take: Take, deadline: float) -> None:
        self.engine, self.recorder, self.take, self.deadline = engine, recorder, take, deadline
        self.texts: dict[str, tuple[int, Sequence[int]]] = {}  # request id -> (number, ids)
        self.unseen: set[int] = set()  # texts with steps whose hidden states could not be told apart

    def run(self, texts: Sequence[tuple[int, Sequence[int]]]) -> bool:
        """Run numbered texts together. False if the time was over first."""
        requests = [self._add(number, ids) for number, ids in texts]
        try:
            while self.engine.scheduler.has_work:
                if time.monotonic() > self.deadline:
                    return False
                self._step()
            return True
        finally:
            for request in requests:
                self.engine.scheduler.abort(request.id)
                self.engine.runner.model.release(request.id)

    def _add(self, number: int, ids: Sequence[int]) -> Request:
        prompt = max(1, len(ids) - DECODED[number % len(DECODED)])
        output = len(ids) - prompt + 1
        params = SamplingParams(max_tokens=output, prompt_logprobs=0)  # which keeps the prefix cache out of it
        request = Request(f"verify-{number}", list(ids[:prompt]), params, output)
        self.texts[request.id] = number, ids
        self.engine.scheduler.add(request)
        return request

    def _step(self) -> None:
        engine = self.engine
        schedule = engine.scheduler.schedule()
        for request in schedule.preempted:
            engine.runner.model.release(request.id)
        self._run(schedule)
        tokens = [[self._next(entry)] if entry.samples else [] for entry in schedule.entries]
        engine.scheduler.advance(schedule.entries, tokens)
        for entry in schedule.entries:
            if entry.end == len(self.texts[entry.request.id][1]):
                engine.scheduler.complete(entry.request, FinishReason.LENGTH)
                engine.runner.model.release(entry.request.id)

    def _next(self, entry: ScheduledTokens) -> int:
        ids = self.texts[entry.request.id][1]
        return ids[entry.end] if entry.end < len(ids) else 0

    def _run(self, schedule: Schedule) -> None:
        entries = schedule.entries
        hidden = None
        if self.recorder is None:
            rows = self.engine.runner.run(entries, set(range(len(entries)))).prompt_rows
        else:
            with self.recorder.recording():
                rows = self.engine.runner.run(entries, set(range(len(entries)))).prompt_rows
            hidden = self.recorder.rows(schedule.num_tokens)
        at = 0
        for index, entry in enumerate(entries):
            number = self.texts[entry.request.id][0]
            own = None if hidden is None else [layer[at : at + entry.count] for layer in hidden]
            if own is None:
                self.unseen.add(number)
            self.take(number, entry.start, rows[index], own)
            at += entry.count


def greedy(engine: Engine, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Let the engine continue all prompts at once, as it does for anybody, past any end of text."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    answers: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        answers[f"greedy-{number}"] = []
        engine.add(ClientRequest(f"greedy-{number}", list(prompt), params))
    while engine.has_work:
        for delta in engine.step():
            answers[delta.request_id].extend(delta.token_ids)
    return list(answers.values())
