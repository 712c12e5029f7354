"""Prompts as clients write them -> token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from core.engine_info import EngineInfo
from core.errors import InvalidParameter, PromptTooLong
from core.server.codec import Codec
from core.server.params import check_ids

MAX_PROMPTS = 2048  # in one body


def split_prompts(prompt: Any, param: str = "prompt") -> list[str] | list[list[int]]:
    """Return the prompts of a text, a list of texts, a list of ids or a list of lists of ids."""
    if isinstance(prompt, str):
        return [prompt]
    if _is_ids(prompt):
        return [prompt]
    if _is_several(prompt) and len(prompt) <= MAX_PROMPTS:
        several: list[str] | list[list[int]] = prompt
        return several
    if isinstance(prompt, list) and len(prompt) > MAX_PROMPTS:
        raise InvalidParameter(f"{param} holds {len(prompt)} prompts; at most {MAX_PROMPTS} are taken.", param)
    if prompt in (None, []) or (isinstance(prompt, list) and [] in prompt):
        raise InvalidParameter(f"{param} is empty; it needs at least one token.", param)
    raise InvalidParameter(
        f"{param} must be a text, a list of texts, a list of token ids or a list of lists of token ids.", param
    )


def _is_several(prompt: Any) -> bool:
    if not isinstance(prompt, list) or not prompt:
        return False
    return all(isinstance(one, str) for one in prompt) or all(_is_ids(one) for one in prompt)


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(one) is int for one in prompt)


async def prompt_ids(
    prompts: Sequence[str] | Sequence[list[int]], codec: Codec, info: EngineInfo, add_special_tokens: bool = True
) -> list[list[int]]:
    """Return the ids of each prompt, checked."""
    texts = [one for one in prompts if isinstance(one, str)]
    found = (
        await codec.encode_all(texts, add_special_tokens)
        if texts
        else [one for one in prompts if isinstance(one, list)]
    )
    for ids in found:
        check_prompt(ids, info)
    return found


def check_prompt(ids: Sequence[int], info: EngineInfo, param: str = "prompt") -> None:
    """Refuse a prompt that can never run. The engine checks again, with max_tokens and its blocks in view."""
    if not ids:
        raise InvalidParameter(f"{param} is empty; it needs at least one token.", param)
    if len(ids) >= info.max_model_len:
        raise PromptTooLong(
            f"The prompt of {len(ids)} tokens leaves no room for an answer in this model's {info.max_model_len}. "
            "Shorten it or start with a larger --max-model-len.",
            param,
        )
    check_ids(ids, info.vocab_size, param)
