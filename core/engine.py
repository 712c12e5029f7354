"""Engine: requests in, deltas out, one step at a time. Runs in the caller's thread; knows nothing about HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from core.config import EngineConfig
from core.contracts import Model, RequestRecord, StepStats, Tokenizer
from core.emit import Sample
from core.engine_info import EngineInfo
from core.errors import InvalidParameter, PromptTooLong
from core.outputs import Delta
from core.plugins import PluginHost
from core.request import ClientRequest, FinishReason, Request, ScheduledTokens
from core.runner import Runner, StepLogits
from core.sampler import SampledToken, Sampler, bad_word_ids, check_token_ids
from core.sampling_params import SamplingParams
from core.schedule import Schedule
from core.scheduler import Scheduler
from core.speculation import accepted_run

if TYPE_CHECKING:
    from torch import Tensor


class Engine:
    """One model being served. Made by `core.engine_build.build_engine`."""

    def __init__(
        self,
        info: EngineInfo,
        config: EngineConfig,
        host: PluginHost,
        runner: Runner,
        scheduler: Scheduler,
        sampler: Sampler,
        tokenizer: Tokenizer | None,
        eos_token_ids: Sequence[int],
    ) -> None:
        self.info, self.config, self.host, self.tokenizer = info, config, host, tokenizer
        self.runner, self.scheduler, self.sampler = runner, scheduler, sampler
        self.eos_token_ids = tuple(eos_token_ids)
        self._samples: dict[str, Sample] = {}  # by Request.id
        self._groups: dict[str, list[str]] = {}  # client request id -> its samples' ids
        self._stats: list[StepStats | RequestRecord] = []
        self._keeps_stats = False

    # ------------------------------------------------------------------------------------------ in

    def add(self, request: ClientRequest) -> None:
        """Queue a client's request. Raises RequestError, naming the field, if it can never be served."""
        self._check(request)
        bad_words = self._bad_words(request.params)
        made = [self._make(request, index) for index in range(request.params.n)]
        added: list[Request] = []
        try:
            for one in made:
                self.scheduler.add(one)
                added.append(one)
        except Exception:
            for one in added:
                self.scheduler.abort(one.id)
            raise
        for one in made:
            self._samples[one.id] = Sample.of(one, self.tokenizer, self.eos_token_ids)
            self.sampler.add(one, bad_words)
        self._groups[request.id] = [one.id for one in made]

    def _check(self, request: ClientRequest) -> None:
        params, limit = request.params, self.info.max_model_len
        if request.id in self._groups:
            raise InvalidParameter(f"A request with the id {request.id!r} is already running.", "request_id")
        if not request.prompt_ids:
            raise InvalidParameter("The prompt is empty; it needs at least one token.", "prompt")
        for token in request.prompt_ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.info.vocab_size:
                raise InvalidParameter(
                    f"The prompt holds {token!r}, which is no token id; ids are 0 to {self.info.vocab_size - 1}.",
                    "prompt",
                )
        asked = params.max_tokens or 1
        if len(request.prompt_ids) + asked > limit:
            raise PromptTooLong(
                f"The prompt of {len(request.prompt_ids)} tokens and max_tokens of {asked} are longer than this "
                f"model's {limit}. Shorten them or start with a larger --max-model-len.",
                "prompt",
            )
        if self.tokenizer is None and (params.stop or params.bad_words):
            name = "stop" if params.stop else "bad_words"
            raise InvalidParameter(f"{name} needs a tokenizer, and this engine runs without one.", name)
        check_token_ids(params, self.info.vocab_size)

    def _make(self, request: ClientRequest, index: int) -> Request:
        params: SamplingParams = request.params
        seed = self.config.seed + hash_text(request.id) if params.seed is None else params.seed
        return Request(
            id=f"{request.id}#{index}",
            prompt_ids=list(request.prompt_ids),
            params=params,
            max_tokens=params.max_tokens or self.info.max_model_len - len(request.prompt_ids),
            group=request.id,
            index=index,
            priority=request.priority,
            seed=(seed + index) % 2**63,
        )

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        return bad_word_ids(self.tokenizer, params.bad_words) if self.tokenizer and params.bad_words else []

    def abort(self, request_id: str) -> None:
        """Drop a client's request and free everything it holds; an unknown id does nothing."""
        for sample_id in self._groups.pop(request_id, []):
            if sample_id in self._samples:
                self.scheduler.abort(sample_id)
                self._forget(self._samples[sample_id], FinishReason.ABORT)

    # ------------------------------------------------------------------------------------------ step

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> list[Delta]:
        """Run one step: schedule, run, sample, finish, emit."""
        start = time.perf_counter()
        schedule = self.scheduler.schedule()
        logits = self._run(schedule)
        sampled = self._sample(schedule, logits)
        self.scheduler.advance(schedule.entries, [[one.token_id for one in run] for run in sampled])
        deltas = self._emit(schedule.entries, sampled)
        self._observe(schedule, sampled, time.perf_counter() - start)
        return deltas

    def _run(self, schedule: Schedule) -> StepLogits | None:
        for request in schedule.preempted:
            self.runner.model.release(request.id)
        if not schedule.entries:
            return None
        now = time.monotonic()
        wants_prompt = set()
        for index, entry in enumerate(schedule.entries):
            sample = self._samples[entry.request.id]
            sample.started = sample.started or now
            if sample.wants_prompt_logprobs:
                wants_prompt.add(index)
        return self.runner.run(schedule.entries, wants_prompt)

    def _sample(self, schedule: Schedule, logits: StepLogits | None) -> list[list[SampledToken]]:
        """Return what each entry's request gets: one token, more where drafts were right, none within a prompt."""
        if logits is None:
            return []
        for index, rows in logits.prompt_rows.items():
            self._take_prompt_logprobs(schedule.entries[index], rows)
        places = [(entry.request, ahead) for entry in schedule.entries for ahead in range(entry.num_sampled)]
        if not places:
            return [[] for _ in schedule.entries]
        requests, ahead = [request for request, _ in places], [ahead for _, ahead in places]
        tokens = iter(self.sampler.sample(logits.sampled_rows, requests, ahead))
        return [self._accept(entry, list(islice(tokens, entry.num_sampled))) for entry in schedule.entries]

    def _accept(self, entry: ScheduledTokens, tokens: list[SampledToken]) -> list[SampledToken]:
        if not entry.drafts:
            return tokens
        return accepted_run(entry.drafts, [token.token_id for token in tokens], tokens)

    def _take_prompt_logprobs(self, entry: ScheduledTokens, rows: Tensor) -> None:
        """Row i of a chunk [start, end) tells how likely token start + i + 1 was."""
        request = entry.request
        end = min(entry.end + 1, request.num_prompt)
        targets = request.prompt_ids[entry.start + 1 : end]
        if targets:
            found = self.sampler.prompt_logprobs(rows[: len(targets)], targets, request.params.prompt_logprobs or 0)
            known = self._samples[request.id].prompt_logprobs
            known.update(zip(range(entry.start + 1, end), found, strict=True))

    def _emit(self, entries: Sequence[ScheduledTokens], sampled: Sequence[list[SampledToken]]) -> list[Delta]:
        deltas = []
        for entry, run in zip(entries, sampled, strict=True):
            if not run:
                continue
            sample = self._samples[entry.request.id]
            delta, finish = sample.take(run)
            deltas.append(delta)
            if finish is not None:
                self.scheduler.complete(entry.request, finish)
                self._forget(sample, finish)
        return deltas

    def _forget(self, sample: Sample, reason: FinishReason) -> None:
        request = sample.request
        del self._samples[request.id]
        siblings = self._groups.get(request.group, [])
        if request.id in siblings:
            siblings.remove(request.id)
            if not siblings:
                del self._groups[request.group]
        self.sampler.release(request.id)
        self.runner.model.release(request.id)
        record = sample.record(reason)
        self.host.on_request_finished(record)
        if self._keeps_stats:
            self._stats.append(record)

    # ------------------------------------------------------------------------------------------ observe

    def _observe(self, schedule: Schedule, sampled: Sequence[list[SampledToken]], seconds: float) -> None:
        entries, tokens = schedule.entries, schedule.num_tokens
        decodes = sum(entry.count for entry in entries if entry.known_end - entry.start == 1)
        pool = self.scheduler.pool
        stats = StepStats(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_tokens=tokens,
            num_prefill_tokens=tokens - decodes,
            num_sampled=sum(map(len, sampled)),
            num_preempted=len(schedule.preempted),
            free_blocks=pool.num_free,
            num_blocks=pool.num_blocks,
            seconds=seconds,
            num_drafted=sum(len(entry.drafts) for entry in entries),
            num_accepted=sum(len(run) - 1 for run in sampled if run),
        )
        self.host.on_step(stats)
        if self._keeps_stats:
            self._stats.append(stats)

    def take_stats(self) -> list[StepStats | RequestRecord]:
        """Return and forget what happened since the last call; kept from the first call on."""
        taken, self._stats, self._keeps_stats = self._stats, [], True
        return taken

    def reset_prefix_cache(self) -> None:
        self.scheduler.pool.reset_prefix_cache()

    @property
    def model(self) -> Model:
        return self.runner.model

    def close(self) -> None:
        """Drop all requests."""
        for request_id in list(self._groups):
            self.abort(request_id)


def hash_text(text: str) -> int:
    """A number that is the same for the same text in every process (Python's hash is not)."""
    value = 0xCBF29CE484222325  # FNV-1a, 64 bits
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value
