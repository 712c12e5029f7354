"""Is a tier right for this model? Runs a few tokens through it and compares with what the module itself gives.

Paged, against the plain module:

    step 1    A[0:11]                       the forward that finds the layers; its attention is repeated on the backend
    step 2    A[11:12]  B[0:6]  C[8:12]     decoding, beside a prefill and the rest of a prompt that shares A's blocks

The plain module runs both texts once, in one batch. A forward reads all weights of a model, so each counts: how far
rounding alone moves its logits is found out only where a difference is in doubt.

Rows, against one cache for each request: requests join a decoding group (a longer, a shorter and an equally long text),
pause and leave. One cache for each request is compared with a copy of the module that sees that request alone.

Models do other things past some number of tokens: a window, a chunk, a temperature, another rope. Where tokens cost
little (`LONG`), A has 62 of them, so that more of this is seen.

In half types a rounding sends a token to another expert now and then, whose logits are then anywhere: the module itself
does so from one batch to the next. So several texts are drawn, and a place is wrong if it is far off in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
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
TEXTS = {"A": "A", "B": "B", "C": "A", "M": "A"}  # what each request says; M shows how rounding moves logits
ROW_STEPS = ("AB", "ABC", "AC", "CD", "ACD", "AD")  # who runs; the first time is the whole prompt
Step = tuple[tuple[str, int, int], ...]  # request, its first token and the one after its last
Forward = Callable[[Tensor], Tensor]  # ids [texts, tokens] -> logits [texts, tokens, vocab]
Place = tuple[int, str, int]  # step, request, token
Movement = Callable[[], float]  # how far logits move when embeddings move by a bit, in their spread


@dataclass(frozen=True)
class Layout:
    """How long the probe's texts are."""

    longest: int  # tokens of A; one more than a number that is likely no size of a model (see taint.py)
    prompts: Mapping[str, int]  # of rows, in tokens; A and C alike, so that they are equally long before the fifth step

    @property
    def lengths(self) -> dict[str, int]:
        return {"A": self.longest, "B": 6}

    @property
    def shared(self) -> int:
        """Tokens of the blocks of A that C shares."""
        return (self.longest - 1) // BLOCK * BLOCK

    @property
    def first(self) -> Step:
        return (("A", 0, self.longest - 1),)

    @property
    def second(self) -> Step:
        return (("A", self.longest - 1, self.longest), ("B", 0, 6), ("C", self.shared, self.longest))

    @property
    def blocks(self) -> dict[str, list[int]]:
        """Blocks of each request, out of order."""
        count = -(-self.longest // BLOCK)
        own = [*range(1, count, 2), *range(0, count, 2)]
        free = iter(range(count, self.num_blocks))
        found = {"A": own, "B": [next(free), next(free)][::-1], "C": [*own[:-1], next(free)]}
        return found | {"M": list(islice(free, count))}

    @property
    def num_blocks(self) -> int:
        return 2 * -(-self.longest // BLOCK) + 4


SHORT = Layout(12, {"A": 7, "B": 2, "C": 7, "D": 12})
LONG = Layout(62, {"A": 33, "B": 2, "C": 33, "D": 50})
CHEAP = 50_000_000  # weights of a model that runs LONG in a moment
DRAWS_IN_HALF = 3  # texts; about one token in twenty goes to another expert


def layout_for(module: nn.Module, max_len: int) -> Layout:
    """Return how long texts are to be for a module that serves up to `max_len` tokens."""
    weights = sum(weight.numel() for weight in module.parameters())
    return LONG if weights <= CHEAP and max_len > LONG.longest else SHORT


def allows(worst: float, dtype: torch.dtype, movement: Movement) -> bool:
    """Can rounding alone move logits this far, in their spread? Deep models amplify the last bit; then it is asked."""
    if dtype != torch.float32:
        return worst < 0.25
    return worst < 3e-4 or (worst < 0.05 and worst < 32 * movement())


@dataclass(frozen=True)
class Probe:
    """The tokens to run and the logits that the plain module gives for them."""

    layout: Layout
    ids: dict[str, list[int]]
    wanted: dict[str, Tensor]  # [tokens, vocab] float32
    embedding: nn.Module | None  # None: nothing is known of how rounding moves logits
    others: tuple[Probe, ...] = ()  # of other texts, asked where this one is in doubt

    @classmethod
    def of(
        cls,
        layout: Layout,
        plain: Forward,
        vocab_size: int,
        embedding: nn.Module | None,
        together: bool = True,
        draws: int = 1,
    ) -> Probe:
        """Draw tokens and ask the plain module.

        Texts that run together all have as many tokens as the longest; what comes after a text does not change it in
        most causal models.
        """
        generator = torch.Generator().manual_seed(0)
        low, names = min(3, vocab_size - 1), list(layout.lengths)  # past padding, begin and end of text
        drawn = torch.randint(low, vocab_size, (draws * len(names), layout.longest), generator=generator)
        texts = [drawn[row, : layout.lengths[names[row % len(names)]]].tolist() for row in range(len(drawn))]
        with torch.inference_mode():
            if together:
                logits: Sequence[Tensor] = list(plain(drawn))
            else:
                logits = [plain(torch.tensor([text]))[0] for text in texts]
        if any(bool(rows.isnan().any()) for rows in logits):
            raise CheckpointError("The model's own module puts out NaN: some of its weights are not finite numbers.")
        # Copies: of a large vocabulary the whole batch is 40 MB.
        wanted = [rows[: len(text)].float().clone() for text, rows in zip(texts, logits, strict=True)]
        made = []
        for start in range(0, len(texts), len(names)):
            own = slice(start, start + len(names))
            ids, rows = (dict(zip(names, found[own], strict=True)) for found in (texts, wanted))
            made.append(cls(layout, ids, rows, embedding))
        return replace(made[0], others=tuple(made[1:]))

    def plain_movement(self, plain: Forward) -> float:
        """Run one text twice in a batch, once with embeddings moved."""
        if self.embedding is None:
            return 0.0
        with torch.inference_mode(), nudged(self.embedding):
            still, moved = plain(torch.tensor([self.ids["A"]] * 2)).float()
        return _distance(moved, still)

    def beginning(self, device: torch.device) -> tuple[Tensor, int]:
        """The tokens of the first step [tokens], and how long their text is."""
        ((name, start, end),) = self.layout.first
        return torch.tensor(self.ids[name][start:end], device=device), self.layout.longest

    def difference(self, model: PagedModel, attention: AttentionBackend, device: torch.device) -> str | None:
        """Run the tier; return what is wrong with it, None if it is right."""
        specs = model.kv_specs()
        attention.allocate(specs, num_blocks=[self.layout.num_blocks] * len(specs), block_size=BLOCK)
        far = self._far(Replay(model), model, attention, device)
        for other in self.others:
            if far:
                again = other._far(model, model, attention, device)
                far = {place: worst for place, worst in far.items() if place in again}
        if not far:
            return None
        number, name, _ = next(iter(far))
        step = (self.layout.first, self.layout.second)[number - 1]
        start, end = next((start, end) for one, start, end in step if one == name)
        worst = max(one for place, one in far.items() if place[:2] == (number, name))
        return (
            f"its logits differ from the plain module's by {worst:.2g} of their spread "
            f"(step {number}, tokens {start} to {end - 1} of request {name})"
        )

    def _far(
        self, first: Model, model: PagedModel, attention: AttentionBackend, device: torch.device
    ) -> dict[Place, float]:
        """Run both steps, `first` being who runs the first; return where rounding does not explain a difference."""
        requests = self._requests()
        movement = cache(lambda: self._movement(Runner(model, attention, BLOCK, device), requests["M"]))
        far: dict[Place, float] = {}
        for number, (step, runs) in enumerate(((self.layout.first, first), (self.layout.second, model)), 1):
            entries = [ScheduledTokens(requests[name], start, end - start) for name, start, end in step]
            rows = Runner(runs, attention, BLOCK, device).run(entries, set(range(len(entries)))).prompt_rows
            wanted = [self.wanted[TEXTS[name]][start:end] for name, start, end in step]
            distances = [_distances(rows[index].float().cpu(), one) for index, one in enumerate(wanted)]
            dtype = rows[0].dtype
            del rows  # of a large vocabulary a megabyte a token, and `movement` takes as much again
            for apart, (name, start, _) in zip(distances, step, strict=True):
                if not allows(max(apart), dtype, movement):
                    places = {(number, name, token): one for token, one in enumerate(apart, start)}
                    far |= {at: one for at, one in places.items() if not allows(one, dtype, movement)}
        return far

    def _movement(self, runner: Runner, request: Request) -> float:
        """Run one text twice through the tier, the second time with embeddings moved."""
        if self.embedding is None:
            return 0.0
        entry = ScheduledTokens(request, 0, len(request.prompt_ids))
        # Every other row tells as much; a view would keep them all, and of a large vocabulary each is a megabyte.
        still = runner.run([entry], {0}).prompt_rows[0][::2].clone()
        with nudged(self.embedding):
            moved = runner.run([entry], {0}).prompt_rows[0][::2]
        return _distance(moved.float(), still.float())

    def _requests(self) -> dict[str, Request]:
        params = SamplingParams(max_tokens=1)
        made = {}
        for name, blocks in self.layout.blocks.items():
            ids = self.ids[TEXTS[name]]
            made[name] = Request(id=f"probe-{name}", prompt_ids=ids, params=params, max_tokens=1)
            made[name].block_ids = blocks
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


def run_rows(
    model: Model, layout: Layout, vocab_size: int, device: torch.device, only: str = "ABCD"
) -> list[dict[str, Tensor]]:
    """Run ROW_STEPS through a model that keeps its own state; return the logits [vocab] of each step by request."""
    requests: dict[str, Request] = {}
    runner = Runner(model, None, BLOCK, device)
    found = []
    for number, everybody in enumerate(ROW_STEPS, 1):
        names = [name for name in everybody if name in only]
        entries = [_next_tokens(name, requests, layout, vocab_size) for name in names]
        found.append(dict(zip(names, runner.run(entries, set()).sampled_rows.cpu(), strict=True)) if names else {})
        for name in set(names) - set("".join(ROW_STEPS[number:])):
            model.release(requests[name].id)
    return found


def rows_difference(
    found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]], dtype: torch.dtype, movement: Movement
) -> str | None:
    """Compare two runs of ROW_STEPS; return what is wrong with the first, None if it is right."""
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True), 1):
        for name, one in ours.items():
            worst = _distance(one.float(), theirs[name].float())
            if not allows(worst, dtype, movement):
                return f"logits differ by {worst:.2g} of their spread (step {number}, request {name})"
    return None


def _next_tokens(name: str, requests: dict[str, Request], layout: Layout, vocab_size: int) -> ScheduledTokens:
    """Schedule a request's next token, or its whole prompt at first."""
    count = layout.prompts[name]
    tokens = _tokens(name, count + len(ROW_STEPS), vocab_size)
    request = requests.get(name)
    if request is None:
        request = requests[name] = _request(name, tokens[:count])
        return ScheduledTokens(request, 0, count)
    known = len(request.prompt_ids)
    request.prompt_ids.append(tokens[known])
    return ScheduledTokens(request, known, 1)


def _tokens(name: str, count: int, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(ord(name))
    return torch.randint(min(3, vocab_size - 1), vocab_size, (count,), generator=generator).tolist()


def _request(name: str, ids: list[int]) -> Request:
    made = Request(id=f"probe-{name}", prompt_ids=ids, params=SamplingParams(max_tokens=1), max_tokens=1)
    made.block_ids = [0] * LONG.longest  # the model keeps its own state
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
    return max(_distances(found, wanted))


def _distances(found: Tensor, wanted: Tensor) -> list[float]:
    """The largest difference of each row."""
    spread = float(wanted.std().clamp(min=1e-6))
    rows = zip(torch.atleast_2d(found), torch.atleast_2d(wanted), strict=True)
    worst = [(one - other).abs_().nan_to_num_(nan=torch.inf).max() for one, other in rows]
    return (torch.stack(worst) / spread).tolist()  # a row at a time: of a large vocabulary each is a megabyte
