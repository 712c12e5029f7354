"""Codec: text to ids and back for the server, off the event loop; and the spelling of single tokens in answers."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

from core.config import EngineConfig
from core.contracts import Tokenizer
from core.errors import InvalidParameter
from core.plugins import PluginHost

logger = logging.getLogger("core_serve.server")
T = TypeVar("T")
REPLACEMENT = "\ufffd"  # what decoding gives for half a character


def take_tokenizer(pickled: bytes | None, config: EngineConfig, host: PluginHost) -> Tokenizer | None:
    """Return the tokenizer that the engine has opened, or open it anew where it cannot be handed over.

    Opening one imports transformers' config classes, and with them torch; the one that is handed over needs neither.
    """
    if pickled is not None:
        try:
            found: Tokenizer | None = pickle.loads(pickled)
            return found
        except Exception as error:  # noqa: BLE001 - any plugin's object, or a class of the checkpoint's own code
            logger.debug("The engine's tokenizer cannot be taken: %s: %s", type(error).__name__, error)
    return _open(config, host)


def _open(config: EngineConfig, host: PluginHost) -> Tokenizer:
    from core.demo import demo_model_path

    checkpoint = host.open_checkpoint(config.model or demo_model_path(), config)
    return host.tokenizer(checkpoint.spec, config)


class Codec:
    """A tokenizer behind one thread: a long prompt holds up neither the event loop nor another call in it."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self.token_text = lru_cache(maxsize=65536)(self._token_text)
        self.token_bytes = lru_cache(maxsize=65536)(self._token_bytes)

    def require(self, param: str) -> Tokenizer:
        """Return the tokenizer. Raises InvalidParameter naming the field that needs one."""
        if self.tokenizer is None:
            raise InvalidParameter(f"{param} needs a tokenizer, and this server runs without one: send ids.", param)
        return self.tokenizer

    async def encode(self, text: str, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        tokenizer = self.require(param)
        return await self._run(lambda: tokenizer.encode(text, add_special_tokens))

    async def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        tokenizer = self.require("prompt")
        return await self._run(lambda: [tokenizer.encode(text, add_special_tokens) for text in texts])

    async def decode(self, ids: Sequence[int], param: str = "tokens", skip_special_tokens: bool = True) -> str:
        tokenizer = self.require(param)
        return await self._run(lambda: tokenizer.decode(ids, skip_special_tokens))

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, options: Mapping[str, Any]
    ) -> list[int]:
        """Return the prompt ids of a conversation; its template writes the special tokens itself."""
        tokenizer = self.require("messages")
        if not tokenizer.has_chat_template:
            advice = "Use /v1/completions, or start with --chat-template."
            raise InvalidParameter(f"This model has no chat template. {advice}", "messages")

        def run() -> list[int]:
            text = tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt, **options)
            return tokenizer.encode(text, add_special_tokens=False)

        return await self._run(run)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    # ------------------------------------------------------------------------------------------ single tokens

    def _token_text(self, token_id: int) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode([token_id], False)

    def _token_bytes(self, token_id: int) -> tuple[int, ...] | None:
        """Return the UTF-8 bytes that a token stands for, None if the vocabulary does not tell."""
        text = self.token_text(token_id)
        if REPLACEMENT not in text:
            return tuple(text.encode())
        spelling = self.tokenizer.id_to_token(token_id) if self.tokenizer is not None else None
        return None if spelling is None else spelled_bytes(spelling)

    def token_name(self, token_id: int) -> str:
        """Return the token's text; for part of a character "bytes:\\xNN", as OpenAI writes it, so that two differ."""
        text = self.token_text(token_id)
        found = self.token_bytes(token_id) if REPLACEMENT in text else None
        return text if found is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def spelled_bytes(spelling: str) -> tuple[int, ...] | None:
    """Read the bytes off a vocabulary entry: "<0xE2>", or byte-level BPE's alphabet of one letter for each byte."""
    if len(spelling) == 6 and spelling.startswith("<0x") and spelling.endswith(">"):
        try:
            return (int(spelling[3:5], 16),)
        except ValueError:
            return None
    alphabet = byte_alphabet()
    found = [alphabet.get(letter) for letter in spelling]
    return None if None in found or not found else tuple(byte for byte in found if byte is not None)


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes printable Latin-1 as itself and the other bytes, in order, as U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + index): byte for index, byte in enumerate(others)}
