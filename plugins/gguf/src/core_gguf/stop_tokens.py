"""Which tokens end a text? Those that the metadata names, and the one that closes a turn of the chat template."""

from __future__ import annotations

import numpy as np

from core_gguf.reader import GGUFFile

_KEYS = ("eos", "eot", "eom")  # end of sequence, of turn, of message
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>")
CONTROL = 3  # token type of special tokens


def eos_token_ids(file: GGUFFile) -> tuple[int, ...]:
    """Return the ids that end generation, eos first."""
    named = [file.get(f"tokenizer.ggml.{key}_token_id", int) for key in _KEYS]
    found = [token for token in named if token is not None]
    return tuple(dict.fromkeys([*found, *_turn_ends(file)]))


def _turn_ends(file: GGUFFile) -> list[int]:
    """Older files name no end of turn: take a well-known one if the template writes it and it is a special token."""
    template = file.get("tokenizer.chat_template", str, "") or ""
    used = [text for text in _TURN_ENDS if text in template]
    tokens, types = file.metadata.get("tokenizer.ggml.tokens"), file.metadata.get("tokenizer.ggml.token_type")
    if not used or not isinstance(tokens, list) or not isinstance(types, np.ndarray):
        return []
    ids = [tokens.index(text) for text in used if text in tokens]
    return [token for token in ids if token < len(types) and types[token] == CONTROL]
