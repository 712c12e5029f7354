"""Tokenizer metadata of a GGUF file -> a `tokenizers.Tokenizer`. Imports tokenizers, not transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from core.errors import CheckpointError
from core_gguf.pretokenizers import WORD_SPLITS, WordSplit
from core_gguf.reader import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # token types
SPACE = "\u2581"  # how sentencepiece writes a space
GEMMA = ("gemma", "gemma2", "gemma3")
_PREFIX = "tokenizer.ggml."


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as the file describes it."""

    tokenizer: Tokenizer
    size: int
    bos: int | None = None  # put before a text, if add_bos
    eos: int | None = None  # put after it, if add_eos
    add_bos: bool = False
    add_eos: bool = False
    special_tokens: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token ... -> text


def read_vocabulary(file: GGUFFile) -> Vocabulary:
    """Build the tokenizer. Raises CheckpointError for a kind that is unknown or metadata that do not fit together."""
    kind = file.require(_PREFIX + "model", str)
    tokens = [str(token) for token in file.require(_PREFIX + "tokens", list)]
    types = _token_types(file, len(tokens))
    if kind == "gpt2":
        split = _word_split(file)
        vocab, add_bos = _spelled_vocab(file, tokens, types), split.add_bos
        tokenizer = _byte_level(file, vocab, split)
    elif kind == "llama":
        vocab, add_bos = _pieces(file, tokens), True
        tokenizer = _sentencepiece(file, vocab)
    else:
        raise CheckpointError(f"{file.path} has a tokenizer of kind {kind!r}. Supported: 'gpt2' and 'llama'.")
    _add_special(tokenizer, tokens, types, vocab)
    ids = {name: _token_id(file, key, len(tokens)) for name, key in _NAMED.items()}
    return Vocabulary(
        tokenizer=tokenizer,
        size=len(tokens),
        bos=ids["bos_token"],
        eos=ids["eos_token"],
        add_bos=bool(file.get(_PREFIX + "add_bos_token", bool, add_bos)) and ids["bos_token"] is not None,
        add_eos=bool(file.get(_PREFIX + "add_eos_token", bool, False)) and ids["eos_token"] is not None,
        special_tokens={name: tokens[token] for name, token in ids.items() if token is not None},
    )


_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _token_id(file: GGUFFile, key: str, size: int) -> int | None:
    found = file.get(f"{_PREFIX}{key}_token_id", int)
    if found is not None and not 0 <= found < size:
        raise CheckpointError(f"{file.path}: {_PREFIX}{key}_token_id is {found}, but there are {size} tokens.")
    return found


def _token_types(file: GGUFFile, size: int) -> list[int]:
    types = file.metadata.get(_PREFIX + "token_type")
    if types is None:
        return [NORMAL] * size
    if not isinstance(types, np.ndarray) or len(types) != size:
        raise CheckpointError(f"{file.path}: {_PREFIX}token_type does not have one number for each of {size} tokens.")
    return [int(entry) for entry in types.tolist()]


def _index(file: GGUFFile, tokens: Sequence[str]) -> dict[str, int]:
    """Return token -> id; a token that is there twice would make one id unreachable."""
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) == len(tokens):
        return vocab
    second = next(number for number, token in enumerate(tokens) if vocab[token] != number)
    text = tokens[second]
    raise CheckpointError(f"{file.path}: the token {text!r} has two ids, {second} and {vocab[text]}.")


def _add_special(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int], vocab: Mapping[str, int]) -> None:
    """Let control tokens, and tokens that the user defined, match in a text as a whole; the former are special."""
    pairs = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind != NORMAL and token in vocab]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in pairs if kind in (UNKNOWN, CONTROL)]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=False) for token, kind in pairs if kind == USER_DEFINED]
    )


# ---------------------------------------------------------------------------------------------- byte-level BPE


def _word_split(file: GGUFFile) -> WordSplit:
    name = file.get(_PREFIX + "pre", str, "default") or "default"
    if name not in WORD_SPLITS:
        known = ", ".join(sorted(WORD_SPLITS))
        raise CheckpointError(f"{file.path} cuts words in the way {name!r} (tokenizer.ggml.pre). Supported: {known}.")
    return WORD_SPLITS[name]


def _spelled_vocab(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Return token -> id: text in byte letters, special tokens as they stand."""
    pairs = zip(tokens, types, strict=True)
    return _index(file, [_spell(token) if kind == NORMAL else token for token, kind in pairs])


def _byte_level(file: GGUFFile, vocab: dict[str, int], split: WordSplit) -> Tokenizer:
    merges = _merges(file)
    if merges is None:
        raise CheckpointError(f"{file.path} lacks the key '{_PREFIX}merges', which a 'gpt2' tokenizer needs.")
    try:
        model = models.BPE(vocab, merges, ignore_merges=split.ignore_merges)
    except Exception as error:  # tokenizers raises bare Exception: a merge of tokens that do not exist
        raise _misfit(file, error) from error
    tokenizer = Tokenizer(model)
    prefix = bool(file.get(_PREFIX + "add_space_prefix", bool, False))
    tokenizer.pre_tokenizer = _words(split, prefix)
    tokenizer.decoder = decoders.ByteLevel()
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _misfit(file: GGUFFile, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file.path}: the tokenizer's tokens and merges do not fit together: {error}.")


def _words(split: WordSplit, prefix: bool) -> pre_tokenizers.PreTokenizer:
    if split.pattern is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=True)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )


def _merges(file: GGUFFile) -> list[tuple[str, str]] | None:
    lines = file.get(_PREFIX + "merges", list)
    if lines is None:
        return None
    merges = [tuple(line.split(" ")) for line in lines]
    for line, merge in zip(lines, merges, strict=True):
        if len(merge) != 2:
            raise CheckpointError(f"{file.path}: the merge {line!r} is not two tokens with a space between them.")
    return merges


@cache
def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself if it is printable, else the next free character from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


@cache
def _letters() -> frozenset[str]:
    return frozenset(_byte_letters().values())


def _spell(token: str) -> str:
    """Return the token in byte letters; some converters write a few tokens as plain text."""
    if _letters().issuperset(token):
        return token
    letters = _byte_letters()
    return "".join(letters[byte] for byte in token.encode())


# ---------------------------------------------------------------------------------------------- sentencepiece


def _pieces(file: GGUFFile, tokens: Sequence[str]) -> dict[str, int]:
    """Return piece -> id. Gemma's tokens of spaces only are stored as spaces, but stand for U+2581 like all others."""
    return _index(file, [token.replace(" ", SPACE) if not token.strip(" ") else token for token in tokens])


def _sentencepiece(file: GGUFFile, vocab: dict[str, int]) -> Tokenizer:
    """BPE over pieces, and bytes where no piece fits."""
    unknown = _token_id(file, "unknown", len(vocab))
    unk_token = None if unknown is None else list(vocab)[unknown]
    merges = _merges(file) or _derived_merges(file, vocab)
    try:
        model = models.BPE(vocab, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    except Exception as error:  # tokenizers raises bare Exception
        raise _misfit(file, error) from error
    tokenizer = Tokenizer(model)
    prefix = bool(file.get(_PREFIX + "add_space_prefix", bool, True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE, prepend_scheme="first" if prefix else "never", split=False
    )
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _derived_merges(file: GGUFFile, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return every way to put a piece together from two others, best piece first.

    Best is the highest score; of one score, the longer left part, then the longer right part, then the earlier piece.
    Gemma's scores do not follow the order of its merges, its ids do.
    """
    pieces = list(vocab)  # half a million pairs of new strings would take 60 MB
    merges = [
        (pieces[left], pieces[right])
        for piece in vocab
        for cut in range(len(piece) - 1, 0, -1)
        if (left := vocab.get(piece[:cut])) is not None and (right := vocab.get(piece[cut:])) is not None
    ]
    if file.get("general.architecture", str) in GEMMA:
        return merges
    scores = _scores(file, len(vocab))
    merges.sort(key=lambda pair: (-scores[vocab[pair[0] + pair[1]]], -len(pair[0]), -len(pair[1])))
    return merges


def _scores(file: GGUFFile, size: int) -> list[float]:
    scores = file.metadata.get(_PREFIX + "scores")
    if not isinstance(scores, np.ndarray) or len(scores) != size:
        raise CheckpointError(f"{file.path}: {_PREFIX}scores does not have one number for each of {size} tokens.")
    return [float(score) for score in scores.tolist()]
