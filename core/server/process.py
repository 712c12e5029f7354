"""The engine's process: takes commands from a pipe, steps while there is work, sends what each step brought.

It sleeps on the pipe when idle, and ends when told to, when a step fails, or when the server's process is gone.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Protocol

from core.config import EngineConfig
from core.contracts import RequestRecord, StepStats, Tokenizer
from core.engine_info import EngineInfo
from core.errors import CoreError, RequestError
from core.outputs import Delta
from core.request import ClientRequest
from core.server.messages import (
    Abort,
    Accepted,
    Add,
    Command,
    Crashed,
    LoadFailed,
    Opened,
    Ready,
    Refused,
    Reply,
    ResetDone,
    ResetPrefixCache,
    Shutdown,
    Stepped,
)

logger = logging.getLogger("core_serve.engine")

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
Resolved = Sequence[tuple[str, str]]  # (name, version) of every plugin that the server's process uses


class SteppingEngine(Protocol):
    """What this file needs of core.engine.Engine."""

    @property
    def info(self) -> EngineInfo: ...
    @property
    def has_work(self) -> bool: ...
    def add(self, request: ClientRequest) -> Any: ...
    def abort(self, request_id: str) -> Any: ...
    def step(self) -> Sequence[Delta]: ...
    def take_stats(self) -> Sequence[StepStats | RequestRecord]: ...
    def reset_prefix_cache(self) -> Any: ...
    def close(self) -> None: ...


HandOver = Callable[[Tokenizer | None], None]  # to be called with the model's tokenizer, once it is open
BuildEngine = Callable[[EngineConfig, Resolved, HandOver], SteppingEngine]  # pickled: a function of a module


def build_in_process(config: EngineConfig, resolved: Resolved, hand_over: HandOver) -> SteppingEngine:
    """Load plugins and model in this process; the plugins must be those of the server's."""
    from core.engine_build import build_engine
    from core.plugins import PluginHost

    host = PluginHost.load(disable=config.disable_plugins)
    host.check_resolved(resolved)
    return build_engine(config, host, hand_over)


def run_process(
    config: EngineConfig, resolved: Resolved, build: BuildEngine, commands: Connection, replies: Connection, level: str
) -> None:
    """Be the engine's process. The exit code is 0 after Shutdown or when the server is gone, else 1."""
    _leave_signals_to_the_server()
    threading.Thread(target=_die_with_the_server, daemon=True, name="watch-server").start()
    logging.basicConfig(level=level.upper(), format=LOG_FORMAT)
    engine = _load(config, resolved, build, replies)
    if engine is None:
        sys.exit(1)
    try:
        EngineLoop(engine, commands, replies).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the server's process is gone: nobody is left to answer
    except Exception as error:
        logger.exception("A step failed; the engine process ends.")
        replies.send(Crashed(f"{type(error).__name__}: {error}"))
        sys.exit(1)


def _leave_signals_to_the_server() -> None:
    """Ctrl-C and `systemctl stop` reach the whole group; requests in flight need this process a little longer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _die_with_the_server() -> None:
    """End at once when the parent is gone, also while a model loads or a step runs."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)


def _load(config: EngineConfig, resolved: Resolved, build: BuildEngine, replies: Connection) -> SteppingEngine | None:
    """Build the engine and say so, or say why not and return None."""
    try:
        engine = _built(config, resolved, build, replies)
    except CoreError as error:
        replies.send(LoadFailed(type(error).__name__, str(error)))
        return None
    except Exception as error:
        logger.exception("The engine could not be built.")
        replies.send(LoadFailed("CoreError", f"The engine could not be built: {type(error).__name__}: {error}"))
        return None
    engine.take_stats()  # the engine keeps them from the first call on
    replies.send(Ready(engine.info))
    return engine


def _built(config: EngineConfig, resolved: Resolved, build: BuildEngine, replies: Connection) -> SteppingEngine:
    """Build the engine; a thread hands its tokenizer over meanwhile: a large vocabulary takes seconds to pickle."""
    with ThreadPoolExecutor(1) as sender:

        def hand_over(tokenizer: Tokenizer | None) -> None:
            sender.submit(_send_tokenizer, tokenizer, replies)

        return build(config, resolved, hand_over)


def _send_tokenizer(tokenizer: Tokenizer | None, replies: Connection) -> None:
    replies.send(Opened(pickled(tokenizer)))


def pickled(tokenizer: Tokenizer | None) -> bytes | None:
    """Return a tokenizer as bytes, None if it is of a kind that has none."""
    try:
        return pickle.dumps(tokenizer)
    except Exception as error:  # noqa: BLE001 - any plugin's object: it may fail in any way
        logger.debug("The tokenizer cannot be handed over: %s: %s", type(error).__name__, error)
        return None


class EngineLoop:
    """Commands in, replies out, one step at a time."""

    def __init__(self, engine: SteppingEngine, commands: Connection, replies: Connection) -> None:
        self.engine = engine
        self.commands = commands
        self.replies = replies
        self.told_idle = True  # whether the server knows that no request is left

    def run(self) -> None:
        """Serve until Shutdown. Raises EOFError when the server's process is gone."""
        while self.take_commands():
            self.report(self.engine.step() if self.engine.has_work else ())
        self.engine.close()

    def take_commands(self) -> bool:
        """Carry out what has arrived; wait for a command if there is no work. False: the process shall end."""
        waiting = not self.engine.has_work
        while waiting or self.commands.poll(0):
            waiting = False
            command: Command = self.commands.recv()
            if isinstance(command, Shutdown):
                return False
            self.carry_out(command)
        return True

    def carry_out(self, command: Add | Abort | ResetPrefixCache) -> None:
        if isinstance(command, Add):
            self.send(self.add(command.request))
        elif isinstance(command, Abort):
            self.engine.abort(command.request_id)
        else:
            self.send(self.reset())

    def add(self, request: ClientRequest) -> Reply:
        try:
            self.engine.add(request)
        except RequestError as error:
            return Refused(request.id, error)
        except Exception as error:
            logger.exception("Request %s could not be added.", request.id)
            return Refused(request.id, CoreError(f"The engine failed on this request: {type(error).__name__}."))
        return Accepted(request.id)

    def reset(self) -> ResetDone:
        try:
            self.engine.reset_prefix_cache()
        except CoreError as error:
            return ResetDone(error)
        return ResetDone()

    def report(self, deltas: Sequence[Delta]) -> None:
        stats, idle = self.engine.take_stats(), not self.engine.has_work
        if deltas or stats or idle != self.told_idle:
            self.send(Stepped(deltas, stats, idle))
            self.told_idle = idle

    def send(self, reply: Reply) -> None:
        self.replies.send(reply)
