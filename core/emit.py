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

    def take(self, sampled: SampledToken) -> tuple[Delta, FinishReason | None]:
        """Turn the token that was just appended to the request into a delta, and decide whether it is the last."""
        self.first_token = self.first_token or time.monotonic()
        if sampled.failed:
            self.request.output_ids.pop()
            return self._delta([], "", None, FinishReason.ERROR, sampled.failed), FinishReason.ERROR
        token = sampled.token_id
        reason: int | str | None
        stop, reason = self._stop_token(token)
        length = FinishReason.LENGTH if len(self.request.output_ids) >= self.request.max_tokens else None
        decoded = self.detokenizer.append([] if stop else [token], is_last=stop or length is not None)
        if decoded.stop is not None and not stop:
            stop, reason = True, decoded.stop
        finish = FinishReason.STOP if stop else length
        return self._delta([token], decoded.text, sampled.logprobs, finish, reason), finish

    def _stop_token(self, token: int) -> tuple[bool, int | None]:
        """Return whether the token ends the text, and the stop token id if it was one that the client named."""
        params = self.request.params
        if len(self.request.output_ids) < params.min_tokens:
            return False, None
        if token in params.stop_token_ids:
            return True, token
        return not params.ignore_eos and token in self.eos_token_ids, None

    def _delta(
        self,
        token_ids: list[int],
        text: str,
        logprobs: TokenLogprobs | None,
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
            logprobs=None if logprobs is None else [logprobs],
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
