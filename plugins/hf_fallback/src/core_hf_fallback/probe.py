"""Is a tier right for this model? Runs a few tokens through it and compares with what the module itself gives.

Paged, against the plain module:

    step 1    A[0:11]                       the forward that finds the layers; its attention is repeated on the backend
    step 2    A[11:12]  B[0:6]  C[8:12]     decoding, beside a prefill and the rest of a prompt that shares A's blocks

The plain module runs both texts once, in one batch. A forward reads all weights of a model, so each counts: how far
rounding alone moves its logits is found out only where a difference is in doubt.

Rows, against one cache for each request: requests join a decoding group (a longer, a shorter and an equally long text),
pause and leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from core.batch import Batch
from core.contracts import AttentionBackend, KVSpec, Model
from core.errors import CheckpointError, UnsupportedAttention
from core.request import Request, ScheduledTokens
from core.runner import Runner
from core.sampling_params import SamplingParams
from core_hf_fallback.paged import PagedModel

BLOCK = 4
LENGTHS = {"A": 12, "B": 6}
TEXTS = {"A": "A", "B": "B", "C": "A", "M": "A"}  # what each request says; M shows how rounding moves logits
BLOCKS = {"A": (5, 2, 9), "B": (1, 7), "C": (5, 2, 3), "M": (10, 11, 12)}
FIRST = (("A", 0, 11),)  # 11 tokens: no size of a model is likely to be that (see taint.py)
SECOND = (("A", 11, 12), ("B", 0, 6), ("C", 8, 12))
ROW_LENGTHS = {"A": 11, "B": 3, "C": 10, "D": 14}
ROW_PROMPTS = {"A": 7, "B": 2, "C": 7, "D": 12}  # before the fifth step A and C are equally long
ROW_STEPS = ("AB", "ABC", "AC", "CD", "ACD", "AD")  # who runs; the first time is the whole prompt
Forward = Callable[[Tensor], Tensor]  # ids [texts, tokens] -> logits [texts, tokens, vocab]


Movement = Callable[[], float]  # how far logits move when embeddings move by a bit, in their spread


def allows(worst: float, dtype: torch.dtype, movement: Movement) -> bool:
    """Can rounding alone move logits this far, in their spread? Deep models amplify the last bit; then it is asked."""
    if dtype != torch.float32:
        return worst < 0.25
    return worst < 3e-4 or (worst < 0.05 and worst < 32 * movement())


@dataclass(frozen=True)
class Probe:
    """The tokens to run and the logits that the plain module gives for them."""

    ids: dict[str, list[int]]
    wanted: dict[str, Tensor]  # [tokens, vocab] float32
    embedding: nn.Module | None  # None: nothing is known of how rounding moves logits

    @classmethod
    def of(cls, plain: Forward, vocab_size: int, embedding: nn.Module | None) -> Probe:
        """Draw tokens and ask the plain module.

        All texts have as many tokens as the longest; what comes after a text does not change it in a causal model.
        """
        generator = torch.Generator().manual_seed(0)
        low, longest = min(3, vocab_size - 1), max(LENGTHS.values())  # past padding, begin and end of text
        drawn = torch.randint(low, vocab_size, (len(LENGTHS), longest), generator=generator)
        with torch.inference_mode():
            logits = plain(drawn).float()
        if bool(logits.isnan().any()):
            raise CheckpointError("The model's own module puts out NaN: some of its weights are not finite numbers.")
        ids = {name: drawn[row, :count].tolist() for row, (name, count) in enumerate(LENGTHS.items())}
        # Copies: of a large vocabulary the whole batch is 40 MB.
        wanted = {name: logits[row][:count].clone() for row, (name, count) in enumerate(LENGTHS.items())}
        return cls(ids, wanted, embedding)

    def plain_movement(self, plain: Forward) -> float:
        """Run one text twice in a batch, once with embeddings moved."""
        if self.embedding is None:
            return 0.0
        with torch.inference_mode(), nudged(self.embedding):
            still, moved = plain(torch.tensor([self.ids["A"]] * 2)).float()
        return _distance(moved, still)

    def beginning(self, device: torch.device) -> tuple[Tensor, int]:
        """The tokens of the first step [tokens], and how long their text is."""
        ((name, start, end),) = FIRST
        return torch.tensor(self.ids[name][start:end], device=device), LENGTHS[name]

    def difference(self, model: PagedModel, attention: AttentionBackend, device: torch.device) -> str | None:
        """Run the tier; return what is wrong with it, None if it is right."""
        specs = model.kv_specs()
        attention.allocate(specs, num_blocks=[16] * len(specs), block_size=BLOCK)
        requests = self._requests()
        movement = cache(lambda: self._movement(Runner(model, attention, BLOCK, device), requests["M"]))
        for number, (step, runs) in enumerate(((FIRST, Replay(model)), (SECOND, model)), 1):
            entries = [ScheduledTokens(requests[name], start, end - start) for name, start, end in step]
            rows = Runner(runs, attention, BLOCK, device).run(entries, set(range(len(entries)))).prompt_rows
            for index, (name, start, end) in enumerate(step):
                worst = _distance(rows[index].float().cpu(), self.wanted[TEXTS[name]][start:end])
                if not allows(worst, rows[index].dtype, movement):
                    return (
                        f"its logits differ from the plain module's by {worst:.2g} of their spread "
                        f"(step {number}, tokens {start} to {end - 1} of request {name})"
                    )
        return None

    def _movement(self, runner: Runner, request: Request) -> float:
        """Run one text twice through the tier, the second time with embeddings moved."""
        if self.embedding is None:
            return 0.0
        entry = ScheduledTokens(request, 0, len(request.prompt_ids))
        still = runner.run([entry], {0}).prompt_rows[0].float()
        with nudged(self.embedding):
            moved = runner.run([entry], {0}).prompt_rows[0].float()
        return _distance(moved, still)

    def _requests(self) -> dict[str, Request]:
        params = SamplingParams(max_tokens=1)
        made = {}
        for name, blocks in BLOCKS.items():
            ids = self.ids[TEXTS[name]]
            made[name] = Request(id=f"probe-{name}", prompt_ids=ids, params=params, max_tokens=1)
            made[name].block_ids = list(blocks)
        return made


class Replay(Model):
    """Answers the recorded row again: its attention calls go to the backend, whose cache they fill."""

    def __init__(self, model: PagedModel) -> None:
        self.model = model
        self.impl_name, self.vocab_size, self.features = model.impl_name, model.vocab_size, model.features

    def kv_specs(self) -> Sequence[KVSpec]:
        return self.model.kv_specs()

    def forward(self, batch: Batch) -> Tensor:
        assert batch.attention is not None
        for layer, (spec, call) in enumerate(zip(self.kv_specs(), self.model.binding.recorded, strict=True)):
            out = batch.attention.attend(call.q, call.k, call.v, layer, call.args)
            worst = _distance(out.float(), call.out.float())
            if not worst < (1e-3 if out.dtype == torch.float32 else 0.25):
                raise UnsupportedAttention(
                    f"Layer {spec.name}: attention backend {batch.attention.name!r} differs from the plain formula by "
                    f"{worst:.2g} of its spread."
                )
        return self.model.recorded

    def release(self, request_id: str) -> None:
        """It keeps nothing."""


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


def rows_difference(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype, movement: Movement) -> str | None:
    """Compare two runs of ROW_STEPS; return what is wrong with the first, None if it is right."""
    for number, (names, ours, theirs) in enumerate(zip(ROW_STEPS, found, wanted, strict=True), 1):
        for name, one, other in zip(names, ours, theirs, strict=True):
            worst = _distance(one.float(), other.float())
            if not allows(worst, dtype, movement):
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
    """Move what an embedding gives for the last text by about one bit of float32, up and down in turn."""
    if embedding is None:
        yield
        return

    def move(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        signs = 1 - 2 * (torch.arange(out.shape[-1], device=out.device) % 2)
        moved = out[-1:] * (1 + signs * 2.0**-23).to(out.dtype)
        return torch.cat([out[:-1], moved])

    handle = embedding.register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def _distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in standard deviations of the wanted logits; NaN counts as infinitely far."""
    spread = wanted.std().clamp(min=1e-6)
    return float((found - wanted).abs_().div_(spread).nan_to_num_(nan=torch.inf).max())
