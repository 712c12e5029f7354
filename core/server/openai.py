"""OpenAI's request bodies: what is taken, and what is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from core.errors import InvalidParameter
from core.server.schema import Body, Closed, ExtraFields, SamplingFields

NOTHING: Mapping[str, Sequence[Any]] = {  # in both APIs
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
    "logits_processors": (None, []),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
}


class Message(Closed):
    """One message of a conversation. `content` is checked by core.server.messages_in."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None


class ChatRequest(Body, SamplingFields, ExtraFields):
    """POST /v1/chat/completions."""

    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {
        **NOTHING,
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "parallel_tool_calls": (None, True, False),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "response_format": (None, {"type": "text"}),
        "audio": (None,),
        "modalities": (None, ["text"]),
        "prediction": (None,),
        "reasoning_effort": (None,),
        "verbosity": (None,),
        "web_search_options": (None,),
        "continue_final_message": (None, False),
        "best_of": (None, 1),
        "echo": (None, False),
    }

    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def limit(self) -> int | None:
        """max_completion_tokens, or its old name. Raises InvalidParameter if they differ."""
        new, old = self.max_completion_tokens, self.max_tokens
        if new is not None and old is not None and new != old:
            raise InvalidParameter(
                f"max_completion_tokens is {new} and max_tokens is {old}: send one of them.", "max_completion_tokens"
            )
        return old if new is None else new

    @property
    def num_logprobs(self) -> int | None:
        """SamplingParams.logprobs. Raises InvalidParameter for top_logprobs without logprobs."""
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise InvalidParameter("top_logprobs needs logprobs to be true.", "top_logprobs")
        return None


class CompletionRequest(Body, SamplingFields, ExtraFields):
    """POST /v1/completions."""

    unsupported: ClassVar[Mapping[str, Sequence[Any]]] = {
        **NOTHING,
        "suffix": (None, ""),
        "response_format": (None, {"type": "text"}),
        "prompt_embeds": (None,),
    }

    prompt: Any = None  # core.server.prompts tells its shapes apart
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    add_special_tokens: bool = True


def check_common(body: ChatRequest | CompletionRequest) -> None:
    """Refuse combinations of fields. Raises InvalidParameter."""
    if body.stream_options is not None and not body.stream:
        raise InvalidParameter("stream_options needs stream to be true.", "stream_options")
    if body.stream_options is not None and body.stream_options.include_obfuscation:
        raise InvalidParameter(
            "stream_options.include_obfuscation is not supported yet. Leave it out.",
            "stream_options.include_obfuscation",
        )
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidParameter("prompt_logprobs cannot be streamed; set stream to false.", "prompt_logprobs")
