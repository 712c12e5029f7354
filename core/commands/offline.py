"""What `generate` and `chat` share: their options, and printing an answer while it comes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from core.commands.options import make_config
from core.plugins import PluginHost
from core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from core.llm import LLM
    from core.outputs import Delta

F = TypeVar("F", bound=Callable[..., Any])


def sampling_options(temperature: float, max_tokens: int) -> Callable[[F], F]:
    """Add the options of SamplingParams; --seed is the engine's, and covers requests that give none."""
    options = [
        click.option(
            "--max-tokens", type=int, default=max_tokens, show_default=True, help="Longest answer, in tokens."
        ),
        click.option("--temperature", type=float, default=temperature, show_default=True, help="0 is greedy."),
        click.option("--top-p", type=float, default=SamplingParams.top_p, show_default=True),
    ]

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def open_llm(given: dict[str, Any], host: PluginHost) -> LLM:
    """Load the model in this process."""
    config = make_config(given, host)
    from core.llm import LLM

    return LLM(**{field.name: getattr(config, field.name) for field in fields(config)})


class Interrupt:
    """Whether Ctrl-C was pressed since `watched` began."""

    pressed = False


@contextmanager
def watched() -> Iterator[Interrupt]:
    """Note the first Ctrl-C, so that a step is never torn in the middle; a second one interrupts at once."""
    interrupt = Interrupt()
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        interrupt.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _closed(deltas: Iterator[Delta]) -> Iterator[None]:
    """Close a stream at the end, which aborts a request that has not finished."""
    try:
        yield
    finally:
        if isinstance(deltas, Generator):
            deltas.close()


def print_answer(deltas: Iterator[Delta]) -> tuple[str, bool]:
    """Print text as it comes. Returns it, and False if Ctrl-C cut it short; then the request is aborted."""
    text = ""
    with watched() as interrupt, _closed(deltas):
        for delta in deltas:
            text += delta.text
            click.echo(delta.text, nl=False)
            if interrupt.pressed:
                break
    click.echo()
    return text, not interrupt.pressed
