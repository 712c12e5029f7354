"""The engine's process, started. Imports no HTTP stack, so that the process can run before that is there."""

from __future__ import annotations

import atexit
import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from core.config import EngineConfig
from core.server.process import BuildEngine, Resolved, run_process


@dataclass(frozen=True)
class Spawned:
    """A process that builds its engine, and this process's ends of its pipes."""

    process: Any
    commands: Connection  # to send on
    replies: Connection  # to receive from

    def kill(self) -> None:
        """End the process at once. One that has ended already is fine."""
        self.process.kill()


def spawn(config: EngineConfig, resolved: Resolved, build: BuildEngine, log_level: str) -> Spawned:
    """Start the process; it is killed when this one ends before it."""
    context = multiprocessing.get_context("spawn")
    commands_in, commands_out = context.Pipe(duplex=False)
    replies_in, replies_out = context.Pipe(duplex=False)
    arguments = (config, resolved, build, commands_in, replies_out, log_level)
    process = context.Process(target=run_process, args=arguments, name="core-serve-engine", daemon=True)
    process.start()
    commands_in.close()  # the process has its own; with ours open its death would go unseen
    replies_out.close()
    spawned = Spawned(process, commands_out, replies_in)
    atexit.register(spawned.kill)  # it ignores SIGTERM, so multiprocessing's own clean-up would wait for ever
    return spawned
