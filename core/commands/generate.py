"""`core-serve generate`: one answer on stdout, without a server."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from core.commands.offline import open_llm, print_answer, sampling_options
from core.commands.options import engine_options
from core.plugins import PluginHost
from core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from core.llm import LLM


@click.command("generate")
@click.argument("prompt")
@click.option("--chat/--raw", default=None, help="Use the chat template or not. Default: if the model has one.")
@sampling_options(temperature=0.0, max_tokens=256)
@engine_options
@click.pass_obj
def generate(
    host: PluginHost, /, prompt: str, chat: bool | None, max_tokens: int, temperature: float, top_p: float, **given: Any
) -> int:
    """Answer PROMPT on stdout, as it comes. `-` reads the prompt from stdin."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    text = sys.stdin.read() if prompt == "-" else prompt
    with open_llm(given, host) as llm:
        as_chat = _has_template(llm) if chat is None else chat
        _, complete = print_answer(llm.stream([{"role": "user", "content": text}] if as_chat else text, params))
    return 0 if complete else 130  # what a shell reports for Ctrl-C


def _has_template(llm: LLM) -> bool:
    return llm.tokenizer is not None and llm.tokenizer.has_chat_template
