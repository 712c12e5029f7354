"""The server's end of one engine process. Two threads move the messages; the event loop sees callbacks only.

Neither a long prompt that waits for the engine to read it nor a half-written reply can hold up the event loop.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from core.server.messages import Command, Reply
from core.server.spawn import Spawned

logger = logging.getLogger("core_serve.server")

EXIT_SECONDS = 10.0  # what a process gets to end by itself once its pipe is closed


class EngineChannel:
    """One engine process and the way to talk to it."""

    def __init__(
        self,
        on_reply: Callable[[EngineChannel, Reply], None],
        on_lost: Callable[[EngineChannel], None],  # the pipe is closed: nothing more will come
        on_exit: Callable[[EngineChannel, int | None], None],  # the process has ended, with this exit code
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_reply, self._on_lost, self._on_exit = on_reply, on_lost, on_exit
        self._outbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self.process: Any = None

    def open(self, spawned: Spawned) -> None:
        """Talk to a process that was started: from now on replies arrive."""
        self._spawned, self.process = spawned, spawned.process
        threading.Thread(target=self._write, args=(spawned.commands,), daemon=True, name="engine-writer").start()
        threading.Thread(target=self._read, args=(spawned.replies,), daemon=True, name="engine-reader").start()

    def send(self, command: Command) -> None:
        """Queue a command; it is lost if the process dies first."""
        self._outbox.put(command)

    def kill(self) -> None:
        """End the process at once. One that has ended already is fine."""
        self._spawned.kill()

    def _write(self, commands: Any) -> None:
        with commands:
            while (command := self._outbox.get()) is not None:
                try:
                    commands.send(command)
                except OSError:
                    return  # the process is gone; the reader tells

    def _read(self, replies: Any) -> None:
        with replies:
            try:
                while True:
                    self._call(self._on_reply, self, replies.recv())
            except (EOFError, OSError):
                pass
            except Exception:
                logger.exception("A reply of the engine process could not be read; it is ended.")
                self.kill()
        self._call(self._on_lost, self)
        self._outbox.put(None)
        self._wait_for_exit()
        self._call(self._on_exit, self, self.process.exitcode)

    def _wait_for_exit(self) -> None:
        self.process.join(EXIT_SECONDS)
        if self.process.exitcode is None:
            logger.warning("The engine process did not end by itself; it is killed.")
            self.kill()
            self.process.join()
        atexit.unregister(self._spawned.kill)

    def _call(self, callback: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(callback, *arguments)
