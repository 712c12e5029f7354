"""One model type, checked: build it small, ask transformers, serve it, compare. Each step runs in a process of its own.

What a step finds is a value that crosses processes; a step that crashes or hangs is a finding like any other.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from core.errors import CoreError

TOLERANCE = 2e-3  # nats
MAX_TOKENS = 10
PRELOADED = ["torch", "transformers", "transformers.modeling_utils", "transformers.generation.utils", "core.llm"]


@dataclass(frozen=True)
class Served:
    """How one implementation did."""

    verdict: str  # right, wrong, refused or crashed
    reason: str = ""  # empty where it is right
    impl: str = ""  # who served; empty where nobody did
    declined: list[list[str]] = field(default_factory=list)  # [implementation, reason], in the order of the bids

    @property
    def is_fallback(self) -> bool:
        return self.impl.startswith("transformers/")


@dataclass(frozen=True)
class Checked:
    """Everything found out about one model type; one line of the results file."""

    model_type: str
    class_name: str
    code: str  # what it was found with: core.supported_results.fingerprint
    unbuilt: str = ""  # why there is no tiny checkpoint
    unsure: str = ""  # why transformers' own answers are no reference
    auto: Served | None = None
    fallback: Served | None = None


class Stopped(Exception):
    """A step gave no value; says why."""


# ------------------------------------------------------------------------------------------------ processes


def start_context() -> Any:
    """Return how steps are started: forked from a process that has torch and transformers, where the system can."""
    methods = multiprocessing.get_all_start_methods()
    if "forkserver" not in methods:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def in_process(context: Any, seconds: float, step: Callable[..., Any], *arguments: Any) -> Any:
    """Run a step in a process of its own and return its value. Raises Stopped if it fails, crashes or hangs."""
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = context.Process(target=_step, args=(sender, log.name, step, arguments), daemon=True)
        process.start()
        sender.close()
        try:
            found, value = receiver.recv() if receiver.poll(seconds) else (False, f"no answer in {seconds:g} s")
        except EOFError:
            process.join()
            found, value = False, f"the process ended with exit code {process.exitcode}: {_last_line(Path(log.name))}"
        finally:
            process.kill()
            process.join()
            receiver.close()
    if not found:
        raise Stopped(value)
    return value


def _step(sender: Connection, log: str, step: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    _quiet()
    try:
        sender.send((True, step(*arguments)))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this model type's finding
        sender.send((False, one_line(error)))


def _quiet() -> None:
    import torch
    import transformers

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("core_serve").setLevel(logging.ERROR)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it printed nothing"


def one_line(error: BaseException) -> str:
    """An error for a table: its class unless it is ours, and its first 300 characters."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, CoreError) else f"{type(error).__name__}: {text}"


# ------------------------------------------------------------------------------------------------ steps


@dataclass(frozen=True)
class Steps:
    """How the steps of one check are run."""

    context: Any  # of multiprocessing
    seconds: float  # the most for each
    device: str = "cpu"  # that serves

    def run(self, step: Callable[..., Any], *arguments: Any) -> Any:
        """Raises Stopped."""
        return in_process(self.context, self.seconds, step, *arguments)

    def serve(self, folder: str, model_impl: str) -> Served:
        try:
            served: Served = self.run(serve, folder, model_impl, self.device)
        except Stopped as reason:
            return Served("crashed", str(reason))
        return served


def check(model_type: str, class_name: str, code: str, steps: Steps) -> Checked:
    """Check one model type."""
    known: dict[str, Any] = {"model_type": model_type, "class_name": class_name, "code": code}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            steps.run(build, model_type, scratch)
        except Stopped as reason:
            return Checked(**known, unbuilt=str(reason))
        try:
            known["unsure"] = steps.run(ask_transformers, scratch)
        except Stopped as reason:
            return Checked(**known, unsure=str(reason))
        auto = steps.serve(scratch, "auto")
        # Where the fallback won the bidding, asking for it by name would build the same once more.
        fallback = auto if auto.is_fallback else steps.serve(scratch, "transformers")
        return Checked(**known, auto=auto, fallback=fallback)


def build(model_type: str, folder: str) -> None:
    """Step 1: the checkpoint."""
    from core.testing import tiny_checkpoint

    tiny_checkpoint(model_type, folder)


def ask_transformers(folder: str) -> str:
    """Step 2: transformers' answers, beside the checkpoint; return how those without its cache differ, or ""."""
    import torch

    from core.testing import assert_same_answers, default_prompts, transformers_answers

    prompts = default_prompts()
    wanted = transformers_answers(folder, prompts, MAX_TOKENS)
    torch.save([(answer.token_ids, answer.logprobs) for answer in wanted], Path(folder) / "answers.pt")
    try:
        assert_same_answers(transformers_answers(folder, prompts, MAX_TOKENS, use_cache=False), wanted, TOLERANCE)
    except AssertionError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - some models cannot go without their cache: then there is one answer
        logging.getLogger("core_serve").warning("generate without a cache fails: %s", one_line(error))
    return ""


def serve(folder: str, model_impl: str, device: str) -> Served:
    """Step 3: the same prompts together, twice, in chunks of a few tokens."""
    import torch

    from core.llm import LLM
    from core.testing import Answer, assert_serves, default_prompts, tight_options

    wanted = [Answer(*answer) for answer in torch.load(Path(folder) / "answers.pt")]
    with contextlib.ExitStack() as stack:
        try:
            llm = stack.enter_context(LLM(model=folder, **tight_options(model_impl) | {"device": device}))
        except CoreError as error:
            return Served("refused", one_line(error))
        declined = [[name, reason] for name, reason in llm.info.attempts if reason is not None]
        known: dict[str, Any] = {"impl": llm.model_impl_name, "declined": declined}
        try:
            assert_serves(llm, default_prompts(), wanted, TOLERANCE)
        except AssertionError as error:
            return Served("wrong", str(error), **known)
        except Exception as error:  # noqa: BLE001 - anybody's module: the table names it
            return Served("crashed", one_line(error), **known)
        return Served("right", **known)
