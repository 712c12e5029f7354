"""Detokenizer: the tokens of one sample, as they come -> text that will not change any more, up to a stop string.

A token is not a piece of text: a character may span tokens, and a space may show only after another token. So the text
of new tokens is the difference between two decodes of a short window, and not of the whole output:

    ... committed earlier | context | pending |        text = decode(context + pending) - decode(context)
                          ^start    ^read     ^end

Pending text that ends in the replacement character may be half a character: it waits for the next token.
The window begins in the prompt, so all deltas together continue it: decode(prompt + output) less decode(prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.contracts import Tokenizer
from core.errors import InvalidParameter
from core.sampling_params import SamplingParams

HALF = "\ufffd"  # what a decoder gives for bytes that are no character, or not yet
CONTEXT = 6  # prompt tokens that the first decode sees, if they are enough
MOST_CONTEXT = 64
MOST_PENDING = 16  # tokens, at the least twice the 4 that a character can have; above this they are split


@dataclass(frozen=True, slots=True)
class Decoded:
    text: str  # decided by these tokens
    stop: str | None = None  # the stop string that ended the sample


class Detokenizer:
    """Decodes one sample. With no tokenizer every text is empty."""

    def __init__(self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        if tokenizer is None and params.stop:
            message = f"stop is {list(params.stop)!r}, but there is no tokenizer to find it with. Use stop_token_ids."
            raise InvalidParameter(message, "stop")
        self._pieces = _Pieces(tokenizer, prompt_ids, params.skip_special_tokens) if tokenizer is not None else None
        self._stops = _StopSearch(params.stop, params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._num_tokens = 0

    def append(self, token_ids: Sequence[int], is_last: bool = False) -> Decoded:
        """Return what new tokens decide. After a stop string, and after the last token, there is no more text."""
        if self._pieces is None:
            return Decoded("")
        text = ""
        for token in token_ids:
            self._num_tokens += 1
            text += self._check(self._pieces.append(token))
        if is_last:
            text += self._check(self._pieces.flush()) + self._stops.flush()
        return Decoded(text, self._stops.found)

    def _check(self, text: str) -> str:
        return self._stops.append(text, honoured=self._num_tokens >= self._min_tokens)


class _Pieces:
    """Tokens -> text, whole characters only."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = self._context(prompt_ids)
        self._read = len(self._ids)
        self._before = self._decode(self._ids)  # text of the context, ids[:read]

    def append(self, token: int) -> str:
        """Take a token; return the text that it decides."""
        self._ids.append(token)
        whole = self._decode(self._ids)
        fresh = self._fresh(whole)
        if fresh and not whole.endswith(HALF):
            self._commit(len(self._ids))
            return fresh
        return self._split() if len(self._ids) - self._read > MOST_PENDING else ""

    def flush(self) -> str:
        """Return the text of all that is pending, half characters too."""
        fresh = self._fresh(self._decode(self._ids))
        self._commit(len(self._ids))
        return fresh

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        """Return the end of the prompt: some text that does not begin within a character."""
        size = CONTEXT
        while size < min(len(prompt_ids), MOST_CONTEXT) and self._decode(prompt_ids[-size:])[:1] in ("", HALF):
            size *= 2
        return list(prompt_ids[-size:])

    def _fresh(self, whole: str) -> str:
        """Return what the pending tokens add to the context's text."""
        before = self._before
        if not whole.startswith(before):
            before = before.rstrip(HALF)  # the prompt ended within a character, which is now complete
        if whole.startswith(before):
            return whole[len(before) :]
        return self._decode(self._ids[self._read :])  # bytes that were a character turned out not to be one

    def _commit(self, end: int) -> None:
        """Make ids[read:end] the context of what follows."""
        self._ids, self._read = self._ids[self._read :], end - self._read
        self._before = self._decode(self._ids[: self._read])

    def _split(self) -> str:
        """Give out the older half of what has been pending for too long: no character is that long."""
        end = self._read + MOST_PENDING // 2
        if not self._decode(self._ids[self._read : end]):  # special tokens; the context before them still matters
            del self._ids[self._read : end]
            return ""
        fresh = self._fresh(self._decode(self._ids[:end]))
        self._commit(end)
        # the cut may lie within the last character: it is given out with the newer half, when it is whole
        self._before = self._before[:-1]
        return fresh[:-1]


class _StopSearch:
    """Finds the stop string that is complete first, and holds back text that may be the beginning of one."""

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self.found: str | None = None

    def append(self, text: str, honoured: bool) -> str:
        """Return the text that is decided. A stop string that is complete while not honoured is plain text."""
        if self.found is not None:
            return ""
        text, old = self._held + text, len(self._held)
        if honoured and (cut := self._find(text, old)) is not None:
            self._held = ""
            return text[:cut]
        keep = self._beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text

    def _find(self, text: str, old: int) -> int | None:
        """Return where to cut `text`, of which a stop string in the first `old` characters was passed over before."""
        ends = []
        for stop in self._stops:
            start = text.find(stop, max(0, old - len(stop) + 1))
            if start >= 0:
                ends.append((start + len(stop), start, stop))
        if not ends:
            return None
        end, start, self.found = min(ends)
        return end if self._include else start

    def _beginning(self, text: str) -> int:
        """Return the length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(len(stop) > size and stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
