"""One sample's way out: its text as it is decided, why it stops, and its times. Knows tokens and text, no tensors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from core.contracts import RequestRecord, Tokenizer
from core.detokenizer import Detokenizer
from core.outputs import Delta, TokenLogprobs
from core.request import FinishReason, Request
from core.sampler import SampledToken


@dataclass
class Sample:
    """What the engine keeps for one running sample beside its Request."""

    request: Request
    detokenizer: Detokenizer
    eos_token_ids: frozenset[int]
    started: float | None = None  # first step; seconds, monotonic
    first_token: float | None = None
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by position in the prompt
    announced: bool = False  # the first delta has gone out

    @classmethod
    def of(cls, request: Request, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int]) -> Sample:
        text = Detokenizer(tokenizer, request.prompt_ids, request.params)
        return cls(request, text, frozenset(eos_token_ids))

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True while prompt logprobs were asked for and are not complete."""
        wanted = self.request.params.prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) < self.request.num_prompt - 1

    def take(self, run: Sequence[SampledToken]) -> tuple[Delta, FinishReason | None]:
        """Turn the tokens that were just appended to the request into a delta, and decide whether they are the last.

        Those after a token that ends the sample are taken back from the request. `run` is not empty.
        """
        self.first_token = self.first_token or time.monotonic()
        output_ids = self.request.output_ids
        before = count = len(output_ids) - len(run)
        text = ""
        finish: FinishReason | None = None
        reason: int | str | None = None
        for sampled in run:
            if sampled.failed:
                finish, reason = FinishReason.ERROR, sampled.failed
                break
            count += 1
            added, finish, reason = self._take_one(sampled.token_id, count)
            text += added
            if finish is not None:
                break
        del output_ids[count:]
        logprobs = [taken.logprobs for taken in run[: count - before] if taken.logprobs is not None]
        return self._delta(output_ids[before:], text, logprobs, finish, reason), finish

    def _take_one(self, token: int, count: int) -> tuple[str, FinishReason | None, int | str | None]:
        """Take the output's token number `count`; return the text it decides, and why the sample ends with it."""
        reason: int | str | None
        stop, reason = self._stop_token(token, count)
        length = FinishReason.LENGTH if count >= self.request.max_tokens else None
        decoded = self.detokenizer.append([] if stop else [token], is_last=stop or length is not None)
        if decoded.stop is not None and not stop:
            stop, reason = True, decoded.stop
        return decoded.text, FinishReason.STOP if stop else length, reason

    def _stop_token(self, token: int, count: int) -> tuple[bool, int | None]:
        """Return whether the token ends the text, and the stop token id if it was one that the client named."""
        params = self.request.params
        if count < params.min_tokens:
            return False, None
        if token in params.stop_token_ids:
            return True, token
        return not params.ignore_eos and token in self.eos_token_ids, None

    def _delta(
        self,
        token_ids: list[int],
        text: str,
        logprobs: list[TokenLogprobs],
        finish: FinishReason | None,
        reason: int | str | None,
    ) -> Delta:
        request, first = self.request, not self.announced
        self.announced = True
        return Delta(
            request_id=request.group,
            index=request.index,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs or None,
            finish_reason=finish.value if finish else None,
            stop_reason=reason,
            num_prompt_tokens=request.num_prompt,
            num_cached_tokens=request.num_cached,
            prompt_logprobs=self._ordered_prompt_logprobs() if first else None,
        )

    def _ordered_prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        if self.request.params.prompt_logprobs is None:
            return None
        return [None, *(self.prompt_logprobs[at] for at in range(1, self.request.num_prompt))]

    def record(self, reason: FinishReason) -> RequestRecord:
        """Sum up a sample that ended."""
        request, now = self.request, time.monotonic()
        started = self.started if self.started is not None else now
        return RequestRecord(
            id=request.id,
            finish_reason=reason.value,
            num_prompt_tokens=request.num_prompt,
            num_cached_tokens=request.num_cached,
            num_output_tokens=len(request.output_ids),
            num_preemptions=request.num_preemptions,
            queue_s=started - request.arrival,
            ttft_s=None if self.first_token is None else self.first_token - request.arrival,
            total_s=now - request.arrival,
        )
