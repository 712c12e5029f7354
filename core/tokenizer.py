"""HFTokenizer: transformers' own tokenizer of a checkpoint, behind the Tokenizer protocol."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.config import EngineConfig
from core.contracts import Tokenizer
from core.errors import CheckpointError, ConfigError, InvalidParameter
from core.json_files import read_json
from core.spec import ModelSpec

# Arguments of apply_chat_template that a conversation may set; its others are the host's.
TEMPLATE_ARGUMENTS = frozenset({"documents", "continue_final_message"})


def load_hf_tokenizer(spec: ModelSpec, options: EngineConfig) -> Tokenizer:
    """Open the tokenizer of the checkpoint, or the one that --tokenizer names. Raises CheckpointError."""
    path = Path(options.tokenizer) if options.tokenizer else spec.path
    tokenizer = _open(path, options.trust_remote_code)
    if options.chat_template:
        tokenizer.chat_template = _read_template(options.chat_template)
    return HFTokenizer(tokenizer, spec.eos_token_ids)


class HFTokenizer:
    """A tokenizer of transformers, fast or slow; `eos_token_ids` are the model's, then the tokenizer's own."""

    def __init__(self, tokenizer: Any, eos_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        own = tokenizer.eos_token_id
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *([] if own is None else [own])]))
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps, so not their number

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text. Raises InvalidParameter if it is no Unicode text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            broken = f"The text has half a character (a lone surrogate) at position {error.start}: send valid Unicode."
            raise InvalidParameter(broken, "prompt") from error
        # verbose: the length limit is the scheduler's to check, and its error says what to do
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids; those that pad the logits beyond the vocabulary have none."""
        if any(token < 0 for token in ids):
            raise InvalidParameter(f"Token id {min(ids)} is negative; ids are 0 to {self.vocab_size - 1}.", "tokens")
        # clean_up would drop spaces before punctuation, which would change text that was already sent
        text = self._tokenizer.decode(
            [token for token in ids if token < self.vocab_size],
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return str(text)

    def id_to_token(self, token_id: int) -> str | None:
        if not 0 <= token_id < self.vocab_size:
            return None
        found: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        return found

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> str:
        """Return the prompt text, special tokens included: encode it with add_special_tokens=False."""
        self._check_chat(messages, template_options)
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **template_options,
            )
        except Exception as error:  # a template is a program: it fails in any way it likes
            message = f"The chat template refuses these messages: {type(error).__name__}: {error}"
            raise InvalidParameter(message, "messages") from error
        return str(text)

    def _check_chat(self, messages: Sequence[Mapping[str, Any]], template_options: Mapping[str, Any]) -> None:
        if not self.has_chat_template:
            advice = "Use completions with a plain prompt, or start with --chat-template FILE."
            raise InvalidParameter(f"This model's tokenizer has no chat template. {advice}", "messages")
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise InvalidParameter("messages must be a list of at least one object with role and content.", "messages")
        known = inspect.signature(self._tokenizer.apply_chat_template).parameters
        taken = sorted(name for name in template_options if name in known and name not in TEMPLATE_ARGUMENTS)
        if taken:
            message = f"chat_template_kwargs must not set {', '.join(taken)}; the server does."
            raise InvalidParameter(message, "chat_template_kwargs")


def _open(path: Path, trust_remote_code: bool) -> Any:
    """Load a tokenizer from a folder, never from a network."""
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder with tokenizer files. {_advice()}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=trust_remote_code, local_files_only=True, config=_plain_config(path)
        )
    except Exception as error:  # OSError, ValueError, ImportError, and bare Exception from the Rust side
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        trust = "If you trust its Python files, start with --trust-remote-code. " if "custom code" in str(error) else ""
        raise CheckpointError(f"The tokenizer in {path} cannot be loaded: {first} {trust}{_advice()}") from error
    files = {*tokenizer.vocab_files_names.values(), "tokenizer.json"}  # a tokenizer of bytes names none and needs none
    if tokenizer.vocab_files_names and not any(
        (path / name).is_file() for name in files
    ):  # transformers then makes an empty one
        raise CheckpointError(f"{path} has no tokenizer files ({', '.join(sorted(files))}). {_advice()}")
    return tokenizer


def _plain_config(path: Path) -> Any:
    """Return a model's config as a plain one where it only helps to choose the tokenizer; None: transformers' own.

    The class of the model type brings much of transformers and torch's compiler with it: over a second and 150 MB.
    Where the tokenizer's files name its class, nothing is asked of the config but what its file says.
    """
    try:
        tokenizer, model = (read_json(path / name) for name in ("tokenizer_config.json", "config.json"))
    except CheckpointError:
        return None
    named = isinstance(tokenizer.get("tokenizer_class"), str)
    if not named or "auto_map" in tokenizer or "auto_map" in model or not isinstance(model.get("model_type"), str):
        return None
    from transformers import PreTrainedConfig

    try:
        return PreTrainedConfig.from_dict(model | {"_name_or_path": str(path)})
    except (ValueError, TypeError, KeyError, AttributeError, OSError):  # only its own class can read it
        return None


def _advice() -> str:
    return "Name a folder that has them with --tokenizer, or serve token ids only with --skip-tokenizer-init."


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The chat template {path} cannot be read: {error}. Give the path of a Jinja file."
        ) from error
