"""tokenizer.ggml.pre -> how a byte-level vocabulary cuts text into words. A name that is not here is an error."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WordSplit:
    pattern: str | None = None  # a regex of the tokenizers library; None = GPT-2's own
    nfc: bool = False  # Unicode-normalize first
    ignore_merges: bool = False  # a word that is a token is not cut further
    add_bos: bool = False  # where the file does not say


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # punctuation, line ends, spaces
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"

_GPT2 = WordSplit()
_QWEN2 = WordSplit(rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}", nfc=True)
_LLAMA3 = WordSplit(rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}", ignore_merges=True, add_bos=True)

WORD_SPLITS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    # llama.cpp also cuts digits off ("  12" is two spaces, 1, 2). transformers does not when it reads such a file, and
    # core-serve gives transformers' ids.
    "smollm": _GPT2,
    "qwen2": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}
