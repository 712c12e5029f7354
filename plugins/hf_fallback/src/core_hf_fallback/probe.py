"""Is a tier right for this model? Runs a few tokens through it and compares with what the module itself gives.

Paged, against the plain module:

Three requests of 7, 3 and 5 tokens; a budget that cuts the first in two, beside the prefill and decoding of others:

    step 1    A[0:4]  B[0:3]
    step 2    A[4:7]  B[3:4]  C[0:5]
    step 3    A[7:8]  B[4:5]  C[5:6]

Rows, against one cache for each request: requests join a decoding group (a longer, a shorter and an equally long text),
pause and leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.contracts import AttentionBackend, Model
from core.request import Request, ScheduledTokens
from core.runner import Runner
from core.sampling_params import SamplingParams

BLOCK = 4
LENGTHS = {"A": 8, "B": 5, "C": 6}
STEPS: tuple[tuple[tuple[str, int, int], ...], ...] = (
    (("A", 0, 4), ("B", 0, 3)),
    (("A", 4, 7), ("B", 3, 4), ("C", 0, 5)),
    (("A", 7, 8), ("B", 4, 5), ("C", 5, 6)),
)
ROW_LENGTHS = {"A": 13, "B": 4, "C": 11, "D": 15}
ROW_PROMPTS = {"A": 7, "B": 2, "C": 7, "D": 12}  # at the sixth step A and C are equally long
ROW_STEPS = ("AB", "ABC", "ABC", "ACD", "CD", "ACD", "AD", "A")  # who runs; the first time is the whole prompt
Forward = Callable[[Tensor], Tensor]  # ids [1, tokens] -> logits [tokens, vocab]


@dataclass(frozen=True)
class Probe:
    """The tokens to run and the logits that the plain module gives for them."""

    ids: dict[str, list[int]]
    wanted: dict[str, Tensor]  # [tokens, vocab] float32
    movement: float  # how far the plain module's own logits move when its embeddings move by a bit, in their spread

    @classmethod
    def of(cls, plain: Forward, vocab_size: int, embedding: nn.Module | None) -> Probe:
        """Draw tokens and ask the plain module, one text at a time, and again with embeddings moved by a bit."""
        generator = torch.Generator().manual_seed(0)
        low = min(3, vocab_size - 1)  # past padding, begin and end of text
        ids = {
            name: torch.randint(low, vocab_size, (count,), generator=generator).tolist()
            for name, count in LENGTHS.items()
        }
        with torch.inference_mode():
            wanted = {name: plain(torch.tensor([tokens])).float() for name, tokens in ids.items()}
            longest = max(ids, key=lambda name: len(ids[name]))
            with nudged(embedding):
                moved = plain(torch.tensor([ids[longest]])).float()
        return cls(ids, wanted, _distance(moved, wanted[longest]))

    def tolerance(self, dtype: torch.dtype) -> float:
        """How far rounding alone may move a logit, in standard deviations: a deep model amplifies the last bit."""
        if dtype != torch.float32:
            return 0.25
        return min(max(3e-4, 32 * self.movement), 0.05)

    def difference(self, model: Model, attention: AttentionBackend, device: torch.device) -> str | None:
        """Run the tier; return what is wrong with it, None if it is right."""
        specs = model.kv_specs()
        attention.allocate(specs, num_blocks=[16] * len(specs), block_size=BLOCK)
        runner = Runner(model, attention, BLOCK, device)
        requests = self._requests()
        for number, step in enumerate(STEPS, 1):
            entries = [ScheduledTokens(requests[name], start, end - start) for name, start, end in step]
            rows = runner.run(entries, wants_prompt=set(range(len(entries)))).prompt_rows
            for index, (name, start, end) in enumerate(step):
                worst = _distance(rows[index].float().cpu(), self.wanted[name][start:end])
                if not worst < self.tolerance(rows[index].dtype):
                    return (
                        f"its logits differ from the plain module's by {worst:.2g} of their spread "
                        f"(step {number}, tokens {start} to {end - 1} of request {name})"
                    )
        return None

    def _requests(self) -> dict[str, Request]:
        params = SamplingParams(max_tokens=1)
        order, made = [5, 2, 9, 1, 7, 3], {}
        for name, ids in self.ids.items():
            made[name] = Request(id=f"probe-{name}", prompt_ids=ids, params=params, max_tokens=1)
            made[name].block_ids = [order.pop() for _ in range(-(-len(ids) // BLOCK))]
        return made


def run_rows(model: Model, vocab_size: int, device: torch.device) -> list[Tensor]:
    """Run ROW_STEPS through a model that keeps its own state; return the logits [requests, vocab] of each step."""
    tokens = {name: _tokens(name, count, vocab_size) for name, count in ROW_LENGTHS.items()}
    requests: dict[str, Request] = {}
    runner = Runner(model, None, BLOCK, device)
    found = []
    for number, names in enumerate(ROW_STEPS, 1):
        entries = [_next_tokens(name, requests, tokens[name]) for name in names]
        found.append(runner.run(entries, set()).sampled_rows.cpu())
        for name in set(names) - set("".join(ROW_STEPS[number:])):
            model.release(requests[name].id)
    return found


def rows_difference(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> str | None:
    """Compare two runs of ROW_STEPS; return what is wrong with the first, None if it is right."""
    for number, (names, ours, theirs) in enumerate(zip(ROW_STEPS, found, wanted, strict=True), 1):
        for name, one, other in zip(names, ours, theirs, strict=True):
            worst = _distance(one.float(), other.float())
            if not worst < tolerance:
                return f"side by side, logits differ by {worst:.2g} of their spread (step {number}, request {name})"
    return None


def _next_tokens(name: str, requests: dict[str, Request], tokens: list[int]) -> ScheduledTokens:
    """Schedule a request's next token, or its whole prompt at first."""
    request = requests.get(name)
    if request is None:
        request = requests[name] = _request(name, tokens[: ROW_PROMPTS[name]])
        return ScheduledTokens(request, 0, len(request.prompt_ids))
    known = len(request.prompt_ids)
    request.prompt_ids.append(tokens[known])
    return ScheduledTokens(request, known, 1)


def _tokens(name: str, count: int, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(ord(name))
    return torch.randint(min(3, vocab_size - 1), vocab_size, (count,), generator=generator).tolist()


def _request(name: str, ids: list[int]) -> Request:
    made = Request(id=f"probe-{name}", prompt_ids=ids, params=SamplingParams(max_tokens=1), max_tokens=1)
    made.block_ids = [0] * 8  # the model keeps its own state
    return made


@contextmanager
def nudged(embedding: nn.Module | None) -> Iterator[None]:
    """Move what an embedding gives by about one bit of float32, up and down in turn."""
    if embedding is None:
        yield
        return

    def move(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        signs = 1 - 2 * (torch.arange(out.shape[-1], device=out.device) % 2)
        return out * (1 + signs * 2.0**-23).to(out.dtype)

    handle = embedding.register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def _distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in standard deviations of the wanted logits; NaN counts as infinitely far."""
    spread = wanted.std().clamp(min=1e-6)
    return float(torch.nan_to_num((found - wanted).abs() / spread, nan=torch.inf).max())
