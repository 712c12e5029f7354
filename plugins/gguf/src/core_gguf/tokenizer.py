"""GGUFTokenizer: core's Tokenizer over a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.chat_template import ChatTemplate
from core.errors import CheckpointError, ConfigError, InvalidParameter
from core.memory import give_back
from core_gguf.reader import GGUFFile
from core_gguf.stop_tokens import eos_token_ids
from core_gguf.vocabulary import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from core.config import EngineConfig
    from core.spec import ModelSpec

_TEMPLATE = "tokenizer.chat_template"


def open_tokenizer(spec: ModelSpec, options: EngineConfig) -> GGUFTokenizer:
    """Read the tokenizer of `spec`'s file; the chat template is options.chat_template, if given."""
    made = _read_tokenizer(spec, options)
    give_back()  # the words of a large vocabulary, read and made into merges, take 190 MB for a moment
    return made


def _read_tokenizer(spec: ModelSpec, options: EngineConfig) -> GGUFTokenizer:
    file = GGUFFile.open(spec.path)
    vocabulary = read_vocabulary(file)
    rows = spec.config["vocab_size"]
    if vocabulary.size > rows:
        raise CheckpointError(f"{file.path} has {vocabulary.size} tokens, but embeddings for {rows} only.")
    named = {"default": _read_template(options.chat_template)} if options.chat_template else _templates(file)
    templates = {name: ChatTemplate(text, vocabulary.special_tokens) for name, text in named.items()}
    return GGUFTokenizer(vocabulary, eos_token_ids(file), templates)


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the chat template {path}: {error}.") from error


def _templates(file: GGUFFile) -> dict[str, str]:
    """Return the file's templates by name; the one without a name is "default"."""
    named = {key.removeprefix(_TEMPLATE + "."): key for key in file.metadata if key.startswith(_TEMPLATE + ".")}
    keys = {**named, "default": _TEMPLATE}
    return {name: file.require(key, str) for name, key in keys.items() if file.metadata.get(key)}


class GGUFTokenizer:
    """Gives the ids that transformers' tokenizer of the same model gives."""

    def __init__(
        self, vocabulary: Vocabulary, eos_token_ids: tuple[int, ...], templates: Mapping[str, ChatTemplate]
    ) -> None:
        self.eos_token_ids = eos_token_ids
        self.bos_token_id = vocabulary.bos
        self.vocab_size = vocabulary.size
        self._vocabulary = vocabulary
        self._tokenizer = vocabulary.tokenizer
        self._templates = templates

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text; special tokens that it spells out become their ids."""
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # what tokenizers says of a str that has no UTF-8
            problem = "The text holds half a surrogate pair (U+D800 to U+DFFF). Send valid Unicode."
            raise InvalidParameter(problem, "prompt") from error
        return self._framed(ids) if add_special_tokens else list(ids)

    def _framed(self, ids: list[int]) -> list[int]:
        """Put the beginning and the end of sequence around a text, where the file asks for them."""
        begin = [self._vocabulary.bos] if self._vocabulary.add_bos else []
        end = [self._vocabulary.eos] if self._vocabulary.add_eos else []
        return [token for token in (*begin, *ids, *end) if token is not None]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD. Ids past the vocabulary have no text."""
        try:
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except OverflowError as error:  # negative, or more than 32 bits
            raise InvalidParameter(
                f"Token ids must be in [0, {self.vocab_size}), got {list(ids)}.", "tokens"
            ) from error
        return text

    def id_to_token(self, token_id: int) -> str | None:
        """Return the vocabulary's own spelling of a token, None if there is no such id."""
        if not 0 <= token_id < self.vocab_size:
            return None
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    @property
    def has_chat_template(self) -> bool:
        return "default" in self._templates

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> str:
        """Return the prompt text of a conversation. Raises InvalidParameter("messages") if the template refuses."""
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise InvalidParameter(
                "This model has no chat template. Send a prompt, or start with --chat-template.", "messages"
            )
        return self._templates[name].render(messages, tools, add_generation_prompt, **template_options)
