"""What the server's process and the engine's process say to each other. Small dataclasses, pickled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.contracts import RequestRecord, StepStats
from core.engine_info import EngineInfo
from core.errors import CoreError
from core.outputs import Delta
from core.request import ClientRequest

# ---------------------------------------------------------------------------------------------- to the engine


@dataclass(frozen=True)
class Add:
    """Run this request. Answered by Accepted or Refused."""

    request: ClientRequest


@dataclass(frozen=True)
class Abort:
    """Forget this request; unknown and finished ones are fine. Not answered."""

    request_id: str


@dataclass(frozen=True)
class ResetPrefixCache:
    """Forget the K/V of finished requests. Answered by ResetDone."""


@dataclass(frozen=True)
class Shutdown:
    """End the process."""


Command = Add | Abort | ResetPrefixCache | Shutdown

# ---------------------------------------------------------------------------------------------- from the engine


@dataclass(frozen=True)
class Opened:
    """The engine has opened the model's tokenizer, before it builds the model."""

    tokenizer: bytes | None  # pickled; None: it cannot be, and the server has to open its own


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""

    info: EngineInfo


@dataclass(frozen=True)
class LoadFailed:
    """The engine could not be built; the process ends."""

    kind: str  # the name of a class of core.errors; the error itself may hold what cannot be pickled
    message: str


@dataclass(frozen=True)
class Accepted:
    request_id: str


@dataclass(frozen=True)
class Refused:
    """This request is not run, and why. Others go on."""

    request_id: str
    error: CoreError


@dataclass(frozen=True)
class Stepped:
    """What one step, or an abort, brought."""

    deltas: Sequence[Delta]
    stats: Sequence[StepStats | RequestRecord]
    idle: bool  # True: no request is left in the engine


@dataclass(frozen=True)
class ResetDone:
    """The prefix cache is empty, or (with an error) could not be emptied."""

    error: CoreError | None = None


@dataclass(frozen=True)
class Crashed:
    """A step failed; the process ends. All its requests are lost."""

    reason: str  # one line; the traceback is in the log


Reply = Opened | Ready | LoadFailed | Accepted | Refused | Stepped | ResetDone | Crashed
