"""What a caller gets back: deltas while a request runs, RequestOutput at the end. Plain Python, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    logprob: float
    rank: int | None = None  # 1 = the most likely token
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]  # token id -> its logprob; the chosen token first, then the best, best first


@dataclass(slots=True)
class Delta:
    """What one step added to one sample. Crosses the process border."""

    request_id: str  # the client request's id
    index: int = 0  # which of its n samples
    token_ids: list[int] = field(default_factory=list)  # new in this step
    text: str = ""  # new, decided text; held back while it may belong to a stop string or half a character
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids
    finish_reason: str | None = None  # "stop", "length", "abort"; set once, on the last delta
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it, None for end of sequence
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # on the first delta; None for the first token


@dataclass
class CompletionOutput:
    """One sample, complete."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the chosen tokens' logprobs."""
        if self.logprobs is None:
            return None
        return sum(step[token].logprob for token, step in zip(self.token_ids, self.logprobs, strict=True))


@dataclass
class RequestOutput:
    """One request, complete: a prompt and its n samples."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
