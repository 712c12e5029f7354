"""`core-serve chat`: a conversation in the terminal, without a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from core.commands.offline import open_llm, print_answer, sampling_options
from core.commands.options import engine_options
from core.errors import RequestError
from core.plugins import PluginHost
from core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from core.llm import LLM

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C aborts an answer."


@click.command("chat")
@click.option("--system", metavar="TEXT", help="What the conversation starts with.")
@sampling_options(temperature=0.7, max_tokens=1024)
@engine_options
@click.pass_obj
def chat(
    host: PluginHost, /, system: str | None, max_tokens: int, temperature: float, top_p: float, **given: Any
) -> None:
    """Talk with a model in the terminal. /reset forgets, /exit ends, Ctrl-C aborts an answer."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    with open_llm(given, host) as llm:
        click.echo(f"{llm.info.model_name} by {llm.model_impl_name}. {HELP}", err=True)
        Conversation(llm, params, system).run()


class Conversation:
    """The messages so far, and the loop that adds to them."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self.llm, self.params = llm, params
        self.start = [{"role": "system", "content": system}] if system is not None else []
        self.messages = list(self.start)

    def run(self) -> None:
        """Read lines until the end of input or /exit."""
        while (line := _read_line()) is not None and line != "/exit":
            if line == "/reset":
                self.messages = list(self.start)
                click.echo("The conversation is forgotten.", err=True)
            elif line.startswith("/"):
                click.echo(f"There is no command {line.split()[0]}. {HELP}", err=True)
            elif line:
                self._answer(line)

    def _answer(self, line: str) -> None:
        messages = [*self.messages, {"role": "user", "content": line}]
        try:
            text, _ = print_answer(self.llm.stream(messages, self.params))
        except RequestError as error:  # too long, say: the conversation can be reset and goes on
            click.echo(f"core-serve: error: {error}", err=True)
            return
        self.messages = [*messages, {"role": "assistant", "content": text}]


def _read_line() -> str | None:
    """Return a stripped line, "" after Ctrl-C, None at the end of input."""
    try:
        import readline  # noqa: F401 - makes input() edit lines and remember them
    except ImportError:
        pass
    try:
        return input("> ").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        click.echo()
        return ""
