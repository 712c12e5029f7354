"""Scheduler: which tokens of which requests run in this step. Plain Python; knows neither tensors nor text.

    add() -> waiting --admit--> running --complete()--> finished
                ^                  |
                +---- preempt -----+      blocks are freed, output is kept and recomputed with the prompt

A step is filled in this order, until the token budget is spent:
  1. running requests with one token left (decodes). One that needs a block when none is free preempts the last of the
     running requests, which may be itself.
  2. running requests in the middle of their prompt: the next chunk. Beside decodes, chunks of a step make up
     max_mixed_prefill_tokens at the most, so that a long prompt does not hold up who decodes (Agrawal et al. 2024,
     "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve").
  3. waiting requests, strictly in order; the first that does not fit ends the step. Never in a step that preempted.
  4. drafts (core/speculation.py) behind the decodes, with what is left of the budget and of free blocks: they delay
     nobody. The blocks that only rejected ones lay in are given back by advance().

Order is (priority, arrival); a preempted request comes before new ones of its priority. A request gets the blocks for
all its known tokens when it is admitted, so that only decodes ever ask for more. A waiting request may preempt running
ones of strictly lower priority for their seat or their blocks, not for the token budget.

Why nothing hangs: the first of the running requests is never the last unless it is alone; alone it fits, or add() had
refused it. So it moves in every step, and everything before it in order is finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.blocks import BlockPool
from core.errors import InvalidParameter, Overloaded, PromptTooLong
from core.request import FinishReason, Request, ScheduledTokens, Status
from core.schedule import Key, Line, Schedule, Step
from core.speculation import Drafter
from core.window_blocks import WindowPool, WindowTable


@dataclass(frozen=True)
class SchedulerLimits:
    """What a step and the queue may hold."""

    max_num_seqs: int  # requests that run at a time
    max_num_batched_tokens: int  # token budget of a step
    max_model_len: int  # tokens of prompt and output
    max_num_waiting: int  # requests in the queue
    max_mixed_prefill_tokens: int | None = None  # tokens of prompts in a step that decodes too; None: the budget
    chunked_prefill: bool = True  # False: a prompt runs whole, over the budget if need be; no prefix cache
    prefix_caching: bool = True
    restart_after: int | None = None  # a text that grows past so many tokens is computed anew; no prefix cache


class Scheduler:
    """Owns all unfinished requests and their blocks. One thread calls it."""

    def __init__(
        self,
        pool: BlockPool,
        limits: SchedulerLimits,
        windows: Sequence[WindowPool] = (),
        drafter: Drafter | None = None,
    ) -> None:
        """`windows`: the pools of layers that look back only so far, beside `pool` for all others."""
        assert drafter is None or limits.restart_after is None, "drafts of a text that is computed anew"
        self.pool = pool
        self.limits = limits
        self.drafter = drafter
        self.windows = tuple(windows)
        pool.on_uncached = self._forget_companions
        self._caching = limits.prefix_caching and limits.chunked_prefill and limits.restart_after is None
        self._requests: dict[str, Request] = {}
        self._keys: dict[str, Key] = {}
        self._waiting = Line()
        self._running = Line()
        self._serial = 0
        self._restarted: set[str] = set()  # ids of requests that grew past limits.restart_after
        self._blocked: tuple[Request, int] | None = None  # first in line, and the fewest free blocks since it failed

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    # ------------------------------------------------------------------------------------ in and out

    def add(self, request: Request) -> None:
        """Queue a request. Raises Overloaded, PromptTooLong or InvalidParameter, and then keeps nothing of it."""
        self._check_new(request)
        self._check_length(request)
        if len(self._waiting) >= self.limits.max_num_waiting:
            raise Overloaded(
                f"{len(self._waiting)} requests are waiting and the queue holds {self.limits.max_num_waiting}. "
                "Try again later, or start the server with a larger max_num_waiting."
            )
        self._serial += 1
        self._requests[request.id] = request
        self._keys[request.id] = (request.priority, 1, request.arrival, self._serial)
        self._waiting.insert(self._keys[request.id], request)

    def abort(self, request_id: str) -> Request | None:
        """End a request in whatever state it is and free all it holds; None if there is no such request.

        Between schedule() and advance() too: its entry is then ignored by advance().
        """
        request = self._requests.get(request_id)
        if request is not None:
            self.complete(request, FinishReason.ABORT)
        return request

    def complete(self, request: Request, reason: FinishReason) -> None:
        """Forget a request, running or waiting, and free its blocks; full ones stay cached until they are reused."""
        assert self._requests.get(request.id) is request, f"request {request.id!r} is not in the scheduler"
        del self._requests[request.id]
        line = self._running if request.status is Status.RUNNING else self._waiting
        line.remove(self._keys.pop(request.id))
        self._restarted.discard(request.id)
        if self.drafter is not None:
            self.drafter.forget(request.id)
        self._release(request)
        request.status = Status.FINISHED
        request.finish_reason = reason

    def _check_new(self, request: Request) -> None:
        if request.id in self._requests:
            raise InvalidParameter(f"Request id {request.id!r} is in use; give each request its own.", "request_id")
        if not request.prompt_ids:
            raise InvalidParameter("The prompt is empty; give at least one token.", "prompt")

    def _check_length(self, request: Request) -> None:
        pool, prompt, output = self.pool, request.num_prompt, max(1, request.max_tokens)
        asked = f"A prompt of {prompt} tokens and max_tokens of {output} make {prompt + output} tokens"
        limit, capacity = self.limits.max_model_len, pool.num_blocks * pool.block_size
        if prompt + output > limit:
            message = f"{asked}; the model's length is {limit}. Shorten the prompt or lower max_tokens."
            raise PromptTooLong(message, "prompt" if prompt >= limit else "max_tokens")
        if prompt + output > capacity:
            message = (
                f"{asked}; the KV cache holds {capacity} ({pool.num_blocks} blocks of {pool.block_size}). Shorten the "
                "prompt, lower max_tokens, or start the server with a larger kv_cache_memory or num_blocks."
            )
            raise PromptTooLong(message, "prompt" if prompt >= capacity else "max_tokens")

    # ------------------------------------------------------------------------------------ a step

    def schedule(self) -> Schedule:
        """Choose what runs now. Never empty while has_work. Call advance() with its entries before the next one."""
        step = Step(self.limits.max_num_batched_tokens, self.windows)
        prefilling = self._run_decodes(step)
        withheld = self._withheld(step)
        step.budget -= withheld
        self._run_chunks(prefilling, step)
        self._admit_waiting(step)
        step.budget += withheld
        if self.drafter is not None:
            self._add_drafts(self.drafter, step)
        return Schedule(list(step.entries.values()), step.preempted)

    def advance(self, entries: Sequence[ScheduledTokens], sampled: Sequence[Sequence[int]]) -> None:
        """Record that the entries ran: count their tokens, append the sampled ones, cache the blocks that became full.

        sampled[i] belongs to entries[i]: none where it does not sample, else the drafts that were accepted and one
        token after them. (Afterwards entry.samples is False, since there are tokens more.) What rejected drafts left
        in the cache is not counted, and written over. Entries of requests completed or aborted since schedule() are
        ignored.
        """
        for entry, tokens in zip(entries, sampled, strict=True):
            request, start = entry.request, entry.start
            if request.status is not Status.RUNNING:
                continue
            assert request.num_computed == start, f"an entry of request {request.id!r} came twice"
            assert not tokens or entry.samples, f"a token for request {request.id!r} in the middle of its prompt"
            assert tuple(tokens[:-1]) == entry.drafts[: len(tokens[:-1])], "tokens that did not run"
            request.output_ids.extend(tokens)
            request.num_computed = end = entry.known_end + len(tokens[:-1])
            self._settle(request, start, end)
            if entry.drafts:
                self._give_back(request)

    def _settle(self, request: Request, start: int, end: int) -> None:
        """Tokens [start, end) are computed for good."""
        size = self.pool.block_size
        if self._caching and start // size < end // size:
            self._register(request, start, end)
        for window, table in zip(self.windows, request.window_tables, strict=True):
            window.trim(table, end)

    def _give_back(self, request: Request) -> None:
        """Free the blocks past all known tokens: rejected drafts lay there."""
        keep = self.pool.blocks_for(request.num_tokens)
        self.pool.free(request.block_ids[keep:])
        del request.block_ids[keep:]
        for window, table in zip(self.windows, request.window_tables, strict=True):
            window.cut(table, request.num_tokens)

    def _run_decodes(self, step: Step) -> list[Request]:
        """Run what has one token left; return the running requests that have more, in order."""
        prefilling: list[Request] = []
        size = self.pool.block_size
        for request in self._running.requests.copy():
            if request.status is not Status.RUNNING:  # preempted by one before it
                continue
            known = request.num_tokens
            if self._must_restart(request):
                self._restarted.add(request.id)
                self._free_windows(request.window_tables)
                request.num_computed = 0
            remaining = known - request.num_computed
            assert remaining > 0, f"request {request.id!r} has no token to run; it was neither sampled nor completed"
            if known > len(request.block_ids) * size and not self._grow(request, step):
                continue
            if remaining > 1:
                prefilling.append(request)
            else:
                step.run(request, 1)
        return prefilling

    def _must_restart(self, request: Request) -> bool:
        """True if its next token is the first past the length at which the model computes its text anew."""
        limit = self.limits.restart_after
        return request.num_computed == limit and request.num_prompt <= limit and request.id not in self._restarted

    def _grow(self, request: Request, step: Step) -> bool:
        """Give a decode the block for its next token; False if it was itself the one to preempt."""
        while (fresh := self.pool.allocate(1)) is None:
            victim = self._running.requests[-1]
            assert len(self._running) > 1, f"request {request.id!r} went past its max_tokens; nobody completed it"
            self._preempt(victim, step)
            if victim is request:
                return False
        request.block_ids += fresh
        return True

    def _withheld(self, step: Step) -> int:
        """Return how much of the budget prompts may not use beside decodes."""
        limit = self.limits.max_mixed_prefill_tokens
        if limit is None or not self.limits.chunked_prefill or not step.entries:
            return 0
        return max(0, step.budget - limit)

    def _run_chunks(self, prefilling: Sequence[Request], step: Step) -> None:
        for request in prefilling:
            if step.budget > 0:
                step.run(request, self._count(request, step))

    def _admit_waiting(self, step: Step) -> None:
        # Not beside a preemption: whoever gave up its blocks would compete for them at once.
        while self._waiting and step.budget > 0 and not step.preempted:
            request = self._waiting.requests[0]
            if not self._fits_budget(request, step) or self._still_blocked(request):
                return
            if not self._admit(request, step):
                self._blocked = (request, self.pool.num_free)
                return
            step.run(request, self._count(request, step))
            step.admitted += 1

    def _add_drafts(self, drafter: Drafter, step: Step) -> None:
        """Let guesses run behind the decodes. Takes free blocks only, and none in a step that preempted."""
        size = self.pool.block_size
        for entry in list(step.entries.values()):
            request = entry.request
            if step.preempted or entry.count > 1 or not entry.samples:
                continue
            held = len(request.block_ids) * size - request.num_tokens
            drafts = drafter.propose(request, min(step.budget, held + self.pool.num_free * size))
            if not drafts:
                continue
            fresh = self.pool.allocate(max(0, self.pool.blocks_for(len(drafts) - held)))
            assert fresh is not None
            request.block_ids += fresh
            step.add_drafts(entry, drafts)

    def _count(self, request: Request, step: Step) -> int:
        return min(request.num_remaining, step.budget) if self.limits.chunked_prefill else request.num_remaining

    def _fits_budget(self, request: Request, step: Step) -> bool:
        # An unchunked prompt larger than what is left of the budget runs as the only prefill of its step.
        return self.limits.chunked_prefill or request.num_remaining <= step.budget or step.admitted == 0

    # ------------------------------------------------------------------------------------ seats and blocks

    def _admit(self, request: Request, step: Step) -> bool:
        """Give a waiting request a seat and blocks for all its known tokens, or change nothing of it."""
        matched = self._match(request)
        self.pool.share(matched)
        tables = [window.adopt(matched) for window in self.windows]
        fresh = self._make_room(request, self.pool.blocks_for(request.num_tokens) - len(matched), step)
        if fresh is None:
            self.pool.free(matched)
            self._free_windows(tables)
            return False
        request.block_ids, request.window_tables = matched + fresh, tables
        request.num_computed = len(matched) * self.pool.block_size
        if request.num_preemptions == 0:
            request.num_cached = request.num_computed
        self._seat(request)
        return True

    def _seat(self, request: Request) -> None:
        priority, _, arrival, serial = key = self._keys[request.id]
        self._waiting.remove(key)
        self._keys[request.id] = (priority, 0, arrival, serial)
        self._running.insert(self._keys[request.id], request)
        request.status = Status.RUNNING
        self._blocked = None

    def _make_room(self, request: Request, count: int, step: Step) -> list[int] | None:
        """Return `count` blocks once there is a seat too, preempting requests of lower priority if that can help."""
        if not self._can_make_room(request, count):
            return None
        while not self._has_room(count):
            if not self._running or self._running.requests[-1].priority <= request.priority:
                return None  # blocks of the preempted ones were shared with others, so fewer came free
            self._preempt(self._running.requests[-1], step)
        return self.pool.allocate(count)

    def _can_make_room(self, request: Request, count: int) -> bool:
        """False if it does not fit even without the requests of lower priority."""
        lower = [other for other in self._running.requests if other.priority > request.priority]
        freed = sum(len(other.block_ids) for other in lower)  # at the most: some may be shared
        return self._has_room(count, seats=len(lower), blocks=freed)

    def _has_room(self, count: int, seats: int = 0, blocks: int = 0) -> bool:
        # One block of headroom for each running request: else the next decode would preempt the newcomer.
        running = len(self._running) - seats
        return running < self.limits.max_num_seqs and count + running <= self.pool.num_free + blocks

    def _still_blocked(self, request: Request) -> bool:
        """True if it failed before and nothing was freed since, so that the prefix cache need not be searched again."""
        if len(self._running) >= self.limits.max_num_seqs:
            return self._running.requests[-1].priority <= request.priority
        if self._blocked is None or self._blocked[0] is not request:
            return False
        free, fewest = self.pool.num_free, self._blocked[1]
        self._blocked = (request, min(free, fewest))
        return free <= fewest

    def _preempt(self, request: Request, step: Step) -> None:
        key = self._keys[request.id]
        self._running.remove(key)
        self._waiting.insert(key, request)
        self._release(request)
        request.status = Status.WAITING
        request.num_preemptions += 1
        step.drop(request)

    def _release(self, request: Request) -> None:
        self.pool.free(request.block_ids)
        self._free_windows(request.window_tables)
        request.block_ids, request.window_tables = [], []
        request.num_computed = 0

    def _free_windows(self, tables: Sequence[WindowTable]) -> None:
        for window, table in zip(self.windows, tables, strict=False):  # a waiting request has no tables
            window.free(table)

    # ------------------------------------------------------------------------------------ prefix cache

    def _match(self, request: Request) -> list[int]:
        """Return cached blocks for its start. The last token is always left to compute: its logits are wanted."""
        if not self._caching or request.params.prompt_logprobs is not None:
            return []
        chain = self.pool.match(request.token_ids(0, request.num_tokens), request.num_tokens - 1)
        return chain[: self._usable(chain)]

    def _usable(self, chain: Sequence[int]) -> int:
        """Return how many of the blocks every window can go on from."""
        count, before = len(chain), -1
        while count != before:
            before = count
            for window in self.windows:
                count = window.usable(chain[:count])
        return count

    def _register(self, request: Request, start: int, end: int) -> None:
        """Cache the blocks that tokens [start, end) made full."""
        size, blocks = self.pool.block_size, request.block_ids
        for index in range(start // size, end // size):
            tokens = request.token_ids(index * size, (index + 1) * size)
            blocks[index] = self.pool.register(blocks[index], blocks[index - 1] if index else None, tokens)
            if self.pool.is_cached(blocks[index]):
                for window, table in zip(self.windows, request.window_tables, strict=True):
                    window.register(table, index, blocks[index])

    def _forget_companions(self, blocks: Iterable[int]) -> None:
        for window in self.windows:
            window.forget(blocks)
