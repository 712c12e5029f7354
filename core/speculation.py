"""Speculation without a second model: tokens are guessed from the request's own text, then checked by the model.

Prompt lookup (Saxena 2023; "assisted generation" of Leviathan et al. 2023 with a lookup in the place of the small
model): where the last n tokens stood before, the tokens that followed them there may follow again.

    text      the cat sat . then the cat          n = 2: "the cat" stood at the start
    drafts    sat . then                          run behind "cat" in the same step, as a prefill chunk is

The model gives its own next token at each of these places. As long as a draft is that token, the next place counts too;
the first that differs ends the run, and what the model says there is kept. So every token is the model's own, and
drafts decide only how many of them one step gives. Plain Python, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from core.request import Request
from core.sampling_params import SamplingParams

T = TypeVar("T")


@dataclass(frozen=True)
class LookupLimits:
    """What is looked up, and how much is taken from there."""

    longest: int  # tokens of an n-gram; the longest that stood before wins
    shortest: int  # >= 1
    num_drafts: int  # the most draft tokens of a request in one step


class NgramIndex:
    """Where each n-gram of one text ended last. Grows with the text; never looks at a token twice."""

    def __init__(self, limits: LookupLimits) -> None:
        self.limits = limits
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> the place after its last token

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add tokens. N-grams that end with the very last token stay out: nothing has followed them yet."""
        known = len(self.tokens)
        self.tokens.extend(token_ids)
        for end in range(max(1, known), len(self.tokens)):
            for size in range(self.limits.shortest, min(self.limits.longest, end) + 1):
                self._ends[tuple(self.tokens[end - size : end])] = end

    def continuation(self, count: int) -> list[int]:
        """Return the `count` tokens that followed the longest n-gram that ends the text; none if it never stood before.

        Past the end of the text they go on in themselves: "a b a b" goes on as "a b a b" for ever.
        """
        for size in range(min(self.limits.longest, len(self.tokens)), self.limits.shortest - 1, -1):
            place = self._ends.get(tuple(self.tokens[-size:]))
            if place is not None:
                found = self.tokens[place : place + count]
                while len(found) < count:
                    found += found[: count - len(found)]
                return found
        return []


class Drafter:
    """Guesses the next tokens of requests. Keeps an index a request until `forget`."""

    def __init__(self, limits: LookupLimits) -> None:
        self.limits = limits
        self._indices: dict[str, NgramIndex] = {}

    def propose(self, request: Request, most: int) -> tuple[int, ...]:
        """Return up to `most` tokens that may follow the last known one; none for a request that cannot take them.

        Never more than what max_tokens leaves beside the token that the step gives anyway.
        """
        count = min(most, self.limits.num_drafts, request.max_tokens - len(request.output_ids) - 1)
        if count < 1 or not takes_drafts(request.params, len(request.output_ids)):
            return ()
        index = self._indices.setdefault(request.id, NgramIndex(self.limits))
        index.extend(request.token_ids(len(index.tokens), request.num_tokens))
        return tuple(index.continuation(count))

    def forget(self, request_id: str) -> None:
        """The request is over. Unknown ids are fine."""
        self._indices.pop(request_id, None)


def takes_drafts(params: SamplingParams, num_output: int) -> bool:
    """False where a token's logits are changed by the tokens just before it, which a step does not know yet."""
    by_history = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    return not (by_history or params.bad_words or num_output < params.min_tokens or params.prompt_logprobs is not None)


def accepted_run(drafts: Sequence[int], token_ids: Sequence[int], results: Sequence[T]) -> list[T]:
    """Return the results that count: up to and with the first whose token is not the draft at its place.

    token_ids [drafts + 1] are the model's own tokens after the last known one and after each draft.
    """
    assert len(drafts) + 1 == len(token_ids) == len(results)
    count = 0
    while count < len(drafts) and drafts[count] == token_ids[count]:
        count += 1
    return list(results[: count + 1])
