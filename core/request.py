"""Request: one sample being generated, as scheduler and runner see it. Plain Python, no torch."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from core.window_blocks import WindowTable


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(str, enum.Enum):
    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens or the model's length
    ABORT = "abort"
    ERROR = "error"  # the model gave no usable logits


@dataclass(eq=False)
class Request:
    """One sample of one client request (a client request with n=3 is three of these with one `group`)."""

    id: str  # unique in the engine
    prompt_ids: list[int]  # not empty
    params: SamplingParams
    max_tokens: int  # params.max_tokens, or what the model's length leaves
    group: str = ""  # the client request's id
    index: int = 0  # which of its n samples
    priority: int = 0  # lower runs first
    arrival: float = field(default_factory=time.monotonic)  # seconds
    seed: int = 0  # set by the engine: the sample's own random stream

    output_ids: list[int] = field(default_factory=list)  # appended by scheduler.finish
    status: Status = Status.WAITING  # set by the scheduler
    finish_reason: FinishReason | None = None  # set by the scheduler
    num_computed: int = 0  # tokens of prompt + output whose K/V is in the cache; set by the scheduler
    block_ids: list[int] = field(default_factory=list)  # in order of position; set by the scheduler
    window_tables: list[WindowTable] = field(default_factory=list)  # one a WindowPool; set by the scheduler
    num_cached: int = 0  # prompt tokens taken from the prefix cache at first admission; set by the scheduler
    num_preemptions: int = 0  # set by the scheduler

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_remaining(self) -> int:
        """Tokens that are known but not yet computed: the whole prompt at first, 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED

    def token_ids(self, start: int, end: int) -> list[int]:
        """Return tokens [start, end) of prompt followed by output."""
        split = len(self.prompt_ids)
        if end <= split:
            return self.prompt_ids[start:end]
        if start >= split:
            return self.output_ids[start - split : end - split]
        return self.prompt_ids[start:] + self.output_ids[: end - split]


@dataclass(frozen=True)
class ClientRequest:
    """What a client asks of the engine; the engine makes params.n Requests of it. Crosses the process border."""

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0  # lower runs first


@dataclass(frozen=True)
class ScheduledTokens:
    """Run tokens [start, start + count) of `request` in this step; the last of them may be drafts."""

    request: Request
    start: int  # == request.num_computed when scheduled
    count: int  # >= 1, with the drafts
    drafts: tuple[int, ...] = ()  # guesses for the tokens after the last known one (core/speculation.py)

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def known_end(self) -> int:
        """Where the drafts begin."""
        return self.end - len(self.drafts)

    @property
    def samples(self) -> bool:
        """True if this reaches the last known token, so that a new one is sampled after it (and after each draft)."""
        return self.known_end == self.request.num_tokens

    @property
    def num_sampled(self) -> int:
        """Tokens whose logits are sampled from."""
        return 1 + len(self.drafts) if self.samples else 0

    def token_ids(self) -> list[int]:
        """Return what runs, [count]."""
        return [*self.request.token_ids(self.start, self.known_end), *self.drafts]
