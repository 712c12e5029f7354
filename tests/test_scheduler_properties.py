"""Random streams of requests through scheduler and pool, run to the end by a runner that simulates the KV cache.

The simulated cache keeps in each slot the token whose K/V would lie there. A sampled token is a function of the whole
context as read back from the slots, so that one wrong, stale or overwritten slot changes the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from core.blocks import BlockPool
from core.reach import Reach
from core.request import FinishReason, Request, ScheduledTokens, Status
from core.sampling_params import SamplingParams
from core.schedule import Schedule
from core.scheduler import Scheduler, SchedulerLimits
from core.speculation import Drafter, LookupLimits, accepted_run, takes_drafts
from core.window_blocks import WindowPool, most_blocks

EMPTY = -1  # a slot that was never written
END = 0  # the token that ends a request early


def next_token(context: Sequence[int]) -> int:
    """The simulated model: one of 13 tokens, END among them, that depends on every token and its position."""
    state = 1
    for token in context:
        state = (state * 31 + token + 7) % 1_000_003
    return state % 13


def expected_output(request: Request) -> list[int]:
    """What the model gives when it runs the request alone and whole."""
    output: list[int] = []
    while len(output) < request.max_tokens and END not in output:
        output.append(next_token(request.prompt_ids + output))
    return output


class HalfRight(Drafter):
    """Guesses some of a request's next tokens right, the others wrong; which ones depends on the text alone."""

    def propose(self, request: Request, most: int) -> tuple[int, ...]:
        count = min(most, self.limits.num_drafts, request.max_tokens - len(request.output_ids) - 1)
        text = request.token_ids(0, request.num_tokens)
        if count < 1 or not takes_drafts(request.params, len(request.output_ids)):
            return ()
        right = next_token([*text, 5]) % (self.limits.num_drafts + 1)
        for place in range(count):
            token = next_token(text)
            text.append(token if place != right else (token + 1) % 13)
        return tuple(text[request.num_tokens :])


@dataclass(frozen=True)
class Ask:
    """One request of a stream."""

    prefix: int  # length of the common prefix it starts with
    tail: tuple[int, ...]
    max_tokens: int
    priority: int
    arrives: int  # step
    aborted: int | None  # step; None = never
    mid_step: bool  # the abort comes between schedule() and advance()
    prompt_logprobs: bool


@dataclass(frozen=True)
class Stream:
    """A pool, its limits, and the requests in order of arrival."""

    num_blocks: int
    block_size: int
    limits: SchedulerLimits
    asks: tuple[Ask, ...]
    resets: frozenset[int]  # steps before which the prefix cache is emptied
    reaches: tuple[Reach, ...] = ()  # of layers that give old blocks back
    num_drafts: int = 0  # the most guessed behind a decode


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    block_size, num_blocks = draw(st.integers(1, 4)), draw(st.integers(3, 14))
    capacity = block_size * num_blocks
    limits = SchedulerLimits(
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 24)),
        max_model_len=capacity,
        max_num_waiting=100,
        max_mixed_prefill_tokens=draw(st.none() | st.integers(1, 24)),
        chunked_prefill=draw(st.sampled_from([True, True, True, False])),
        prefix_caching=draw(st.sampled_from([True, True, True, False])),
    )
    asks = draw(st.lists(_asks(capacity), min_size=1, max_size=12))
    resets = draw(st.frozensets(st.integers(0, 30), max_size=2))
    sizes = st.integers(1, 9)
    reach = st.builds(Reach, window=sizes) | st.builds(Reach, chunk=sizes) | st.builds(Reach, sizes, sizes)
    reaches = draw(st.lists(reach, max_size=2, unique=True))
    arrived = tuple(sorted(asks, key=lambda ask: ask.arrives))
    num_drafts = draw(st.sampled_from([0, 1, 3, 9]))
    return Stream(num_blocks, block_size, limits, arrived, resets, tuple(reaches), num_drafts)


@st.composite
def _asks(draw: st.DrawFn, capacity: int) -> Ask:
    max_tokens = draw(st.integers(1, max(1, capacity // 2)))
    prefix = draw(st.integers(0, capacity - max_tokens))
    most = min(6, capacity - max_tokens - prefix)
    tail = draw(st.lists(st.integers(1, 2), min_size=0 if prefix else min(1, most), max_size=most))
    return Ask(
        prefix,
        tuple(tail),
        max_tokens,
        priority=draw(st.sampled_from([0, 0, 0, 1, -1])),
        arrives=draw(st.integers(0, 15)),
        aborted=draw(st.none() | st.none() | st.integers(0, 40)),
        mid_step=draw(st.booleans()),
        prompt_logprobs=draw(st.sampled_from([False, False, False, True])),
    )


@dataclass
class Simulation:
    """The engine's loop around a scheduler, with every rule checked in every step."""

    stream: Stream
    requests: list[Request] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)  # in order of first admission
    drafted: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.stream.num_blocks, self.stream.block_size)
        self.windows = [self._window(reach) for reach in self.stream.reaches]
        drafter = HalfRight(LookupLimits(1, 1, self.stream.num_drafts)) if self.stream.num_drafts else None
        self.scheduler = Scheduler(self.pool, self.stream.limits, self.windows, drafter)
        self.slots = [EMPTY] * (self.stream.num_blocks * self.stream.block_size)
        self.window_slots = [[EMPTY] * (pool.num_blocks * pool.block_size) for pool in self.windows]
        self.step = 0

    def _window(self, reach: Reach) -> WindowPool:
        """As the engine sizes it: for the most that can be in use, and never more than the text's own pool."""
        limits, size = self.stream.limits, self.stream.block_size
        step = limits.max_num_batched_tokens if limits.chunked_prefill else limits.max_model_len
        most = most_blocks(reach, size, limits.max_num_seqs, step)
        return WindowPool(reach, min(most, self.stream.num_blocks), size)

    @property
    def alive(self) -> list[Request]:
        return [request for request in self.requests if not request.is_finished]

    def run(self) -> None:
        most = 2000
        while self.scheduler.has_work or len(self.requests) < len(self.stream.asks):
            self._arrivals()
            self._aborts(mid_step=False)
            if self.step in self.stream.resets:
                self.pool.reset_prefix_cache()
            if self.scheduler.has_work:
                self._one_step()
            self.step += 1
            assert self.step < most, "no end in sight"

    def _arrivals(self) -> None:
        for ask in self.stream.asks[len(self.requests) :]:
            if ask.arrives > self.step:
                return
            prompt = [1 + index % 3 for index in range(ask.prefix)] + list(ask.tail)
            params = SamplingParams(prompt_logprobs=0 if ask.prompt_logprobs else None)
            name, arrival = str(len(self.requests)), float(ask.arrives)
            self.requests.append(Request(name, prompt, params, ask.max_tokens, "", 0, ask.priority, arrival))
            self.scheduler.add(self.requests[-1])

    def _aborts(self, mid_step: bool) -> None:
        for request, ask in zip(self.requests, self.stream.asks, strict=False):
            if ask.aborted is not None and ask.aborted <= self.step and ask.mid_step == mid_step:
                if not request.is_finished:
                    assert self.scheduler.abort(request.id) is request
                    assert request.block_ids == []
                assert self.scheduler.abort(request.id) is None

    def _one_step(self) -> None:
        before = {request.id: request.status for request in self.alive}
        schedule = self.scheduler.schedule()
        self._check_schedule(schedule, before)
        self._aborts(mid_step=True)
        sampled = self._run_model(schedule)
        self.scheduler.advance(schedule.entries, sampled)
        self._check_memory()
        for entry in schedule.entries:
            request = entry.request
            if not request.is_finished and request.output_ids:
                self._stop(request)
        self.pool.check([request.block_ids for request in self.alive])

    def _stop(self, request: Request) -> None:
        if END in request.output_ids:  # in the middle of a run of accepted drafts, perhaps
            del request.output_ids[request.output_ids.index(END) + 1 :]
        if request.output_ids[-1] == END:
            self.scheduler.complete(request, FinishReason.STOP)
        elif len(request.output_ids) == request.max_tokens:
            self.scheduler.complete(request, FinishReason.LENGTH)

    def _run_model(self, schedule: Schedule) -> list[list[int]]:
        """Write every entry's tokens, then read every context, as one step of a model does."""
        for entry in schedule.entries:
            if not entry.request.is_finished:
                for position, token in enumerate(entry.token_ids(), entry.start):
                    self.slots[self._slot(entry.request, position)] = token
                    for index, slots in enumerate(self.window_slots):
                        slots[self._window_slot(entry.request, index, position)] = token
        return [[] if entry.request.is_finished else self._sample(entry) for entry in schedule.entries]

    def _sample(self, entry: ScheduledTokens) -> list[int]:
        context = self._context(entry.request, entry.end)
        text = [*entry.request.token_ids(0, entry.known_end), *entry.drafts]
        assert context == text, "a slot holds another token than its request's"
        self._check_windows(entry, text)
        if not entry.samples:
            return []
        tokens = [next_token(context[:end]) for end in range(entry.known_end, entry.end + 1)]
        run = accepted_run(entry.drafts, tokens, tokens)
        self.drafted += len(entry.drafts)
        self.accepted += len(run) - 1
        return run

    def _slot(self, request: Request, position: int) -> int:
        block = request.block_ids[position // self.stream.block_size]
        return block * self.stream.block_size + position % self.stream.block_size

    def _window_slot(self, request: Request, index: int, position: int) -> int:
        table, size = request.window_tables[index], self.stream.block_size
        assert position // size >= table.first, "a block was given back that is still read"
        return table.ids[position // size] * size + position % size

    def _check_windows(self, entry: ScheduledTokens, text: Sequence[int]) -> None:
        """Every token of this step finds in each window's blocks all that it sees."""
        for index, (pool, slots) in enumerate(zip(self.windows, self.window_slots, strict=True)):
            for position in range(entry.start, entry.end):
                for seen in range(pool.reach.oldest(position), position + 1):
                    token = slots[self._window_slot(entry.request, index, seen)]
                    assert token == text[seen], "a window's slot holds another token"

    def _context(self, request: Request, end: int) -> list[int]:
        return [self.slots[self._slot(request, position)] for position in range(end)]

    def _check_schedule(self, schedule: Schedule, before: dict[str, Status]) -> None:
        assert schedule.entries, "a step with work ran nothing"
        running = [request for request in self.alive if request.status is Status.RUNNING]
        ids = [entry.request.id for entry in schedule.entries]
        assert len(set(ids)) == len(ids)
        assert len(running) == self.scheduler.num_running <= self.stream.limits.max_num_seqs
        assert len(self.alive) - len(running) == self.scheduler.num_waiting
        assert all(entry.start == entry.request.num_computed and entry.count >= 1 for entry in schedule.entries)
        assert all(entry.request.status is Status.RUNNING for entry in schedule.entries)
        assert all(request.status is Status.WAITING and not request.block_ids for request in schedule.preempted)
        first = min(running, key=self._rank)
        assert first.id in ids, "the first in order did not move"
        decodes = [request.id for request in running if request.num_remaining == 1]
        assert set(decodes) <= set(ids), "a decode had to wait"
        self._check_budget(schedule, before)
        self._check_order(schedule, before)

    def _check_budget(self, schedule: Schedule, before: dict[str, Status]) -> None:
        limits = self.stream.limits
        if limits.chunked_prefill:
            assert schedule.num_tokens <= limits.max_num_batched_tokens
            self._check_mixed(schedule, before)
            return
        assert all(entry.samples for entry in schedule.entries), "a prompt was cut"
        started = [entry for entry in schedule.entries if before[entry.request.id] is Status.WAITING]
        assert schedule.num_tokens <= limits.max_num_batched_tokens or len(started) == 1

    def _check_mixed(self, schedule: Schedule, before: dict[str, Status]) -> None:
        limit = self.stream.limits.max_mixed_prefill_tokens
        ran = [entry.request for entry in schedule.entries if before[entry.request.id] is Status.RUNNING]
        decodes = {request.id for request in ran if request.num_remaining == 1}
        if limit is not None and decodes:
            others = [entry for entry in schedule.entries if entry.request.id not in decodes]
            prompts = [entry.count - len(entry.drafts) for entry in others]  # one that ends its prompt may guess on
            assert sum(prompts) <= limit, "prompts held up the decodes beside them"

    def _check_order(self, schedule: Schedule, before: dict[str, Status]) -> None:
        """Nobody who waited before this step was overtaken in it."""
        started = [entry.request for entry in schedule.entries if before[entry.request.id] is Status.WAITING]
        waited = [one for one in self.alive if before[one.id] is Status.WAITING and one.status is Status.WAITING]
        for request in started:
            for other in waited:
                assert self._queue_rank(request) < self._queue_rank(other), "a waiting request was overtaken"
        for request in schedule.preempted:
            others = [one for one in self.alive if one.status is Status.RUNNING]
            assert all(self._rank(other) < self._rank(request) for other in others), "the wrong one was preempted"
        assert all(new.priority < old.priority for new in started for old in schedule.preempted)
        self.admitted += [request for request in started if request not in self.admitted]

    def _rank(self, request: Request) -> tuple[int, float, int]:
        return request.priority, request.arrival, int(request.id)

    def _queue_rank(self, request: Request) -> tuple[int, bool, float, int]:
        return request.priority, request not in self.admitted, request.arrival, int(request.id)

    def _check_memory(self) -> None:
        """Owners are counted right, and a block with two owners is full, computed and of equal content."""
        self.pool.check([request.block_ids for request in self.alive])
        for index, window in enumerate(self.windows):
            tables = [request.window_tables[index] for request in self.alive if request.window_tables]
            window.check(tables)
            for table in tables:  # between steps a request holds what its next token sees, cut by block edges
                held = len(table.ids) - table.first
                assert held <= (window.reach.most - 1) // window.block_size + 2, "old blocks were not given back"
        owners: dict[int, list[tuple[Request, int]]] = {}
        for request in self.alive:
            context = self._context(request, request.num_computed)
            assert context == request.token_ids(0, request.num_computed), "a block changed under its owner"
            for index, block in enumerate(request.block_ids):
                owners.setdefault(block, []).append((request, index))
        for shared in owners.values():
            if len(shared) > 1:
                assert len({index for _, index in shared}) == 1
                ends = [(request, (index + 1) * self.stream.block_size) for request, index in shared]
                assert all(request.num_computed >= end for request, end in ends), (
                    "a block that is still written is shared"
                )
                assert len({tuple(request.token_ids(0, end)) for request, end in ends}) == 1
                assert self.stream.limits.prefix_caching and self.stream.limits.chunked_prefill


def simulate(stream: Stream) -> Simulation:
    simulation = Simulation(stream)
    simulation.run()
    return simulation


@settings(max_examples=120, deadline=None)
@given(streams())
def test_every_request_ends_with_exactly_its_tokens_and_no_block_leaks(stream: Stream) -> None:
    simulation = simulate(stream)
    for request, ask in zip(simulation.requests, stream.asks, strict=True):
        expected = expected_output(request)
        assert request.is_finished and request.block_ids == []
        if request.finish_reason is FinishReason.ABORT:
            assert ask.aborted is not None
            assert request.output_ids == expected[: len(request.output_ids)]
        else:
            assert request.output_ids == expected
            assert request.finish_reason is (FinishReason.STOP if END in expected else FinishReason.LENGTH)
    assert simulation.pool.num_used == 0
    assert all(window.num_free == window.num_blocks for window in simulation.windows)
    assert (simulation.scheduler.num_running, simulation.scheduler.num_waiting) == (0, 0)


@settings(max_examples=40, deadline=None)
@given(streams())
def test_requests_of_one_priority_start_in_order_of_arrival(stream: Stream) -> None:
    simulation = simulate(stream)
    for priority in (-1, 0, 1):
        started = [int(request.id) for request in simulation.admitted if request.priority == priority]
        assert started == sorted(started)


@settings(max_examples=40, deadline=None)
@given(streams())
def test_the_prefix_cache_changes_no_token(stream: Stream) -> None:
    asks = tuple(Ask(**(vars(ask) | {"aborted": None})) for ask in stream.asks)
    outputs = []
    for caching in (True, False):
        limits = SchedulerLimits(**(vars(stream.limits) | {"prefix_caching": caching}))
        simulation = simulate(replace(stream, limits=limits, asks=asks))
        outputs.append([request.output_ids for request in simulation.requests])
        for request in simulation.requests:
            assert request.num_cached < request.num_prompt and request.num_cached % stream.block_size == 0
            assert request.num_cached == 0 or (caching and request.params.prompt_logprobs is None)
    assert outputs[0] == outputs[1]


def test_the_simulation_meets_preemption_sharing_cache_hits_and_drafts_right_and_wrong() -> None:
    """The streams above would prove little if they never ran into these; this fixed one shows that they do."""
    limits = SchedulerLimits(4, 16, 40, 100)
    asks = tuple(Ask(6, (1, 2), 12, -step % 3, step, None, False, False) for step in range(12))
    simulation = simulate(Stream(10, 4, limits, asks, frozenset(), (Reach(window=5), Reach(chunk=8)), num_drafts=5))
    assert sum(request.num_preemptions for request in simulation.requests) > 0
    assert sum(request.num_cached for request in simulation.requests) > 0
    assert 0 < simulation.accepted < simulation.drafted
