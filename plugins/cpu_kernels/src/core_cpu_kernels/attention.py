"""CpuKernelAttention: paged attention that reads K and V where they lie, one call of the library a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.batch import Batch
from core.contracts import AttentionArgs, KVSpec
from core.errors import CoreError, UnsupportedAttention
from core.reach import Reach
from core_cpu_kernels.attention_calls import HONOURS, TYPES, LayerCall, StepCall, cache_places, make_step
from core_cpu_kernels.library import Library, wanted_instruction_set


class CpuKernelAttention:
    """A `core.contracts.AttentionBackend` for CPUs. Honours every argument but attention to the future."""

    name = "cpu_kernels"
    honours = HONOURS

    def __init__(self, instruction_set: str | None = None) -> None:
        """`instruction_set`: one of INSTRUCTION_SETS; None: what the environment says, else the best there is."""
        self.library = Library(wanted_instruction_set() if instruction_set is None else instruction_set)
        self._attend, self.set = self.library.attend, self.library.attention_set

    def allocate(self, specs: Sequence[KVSpec], num_blocks: Sequence[int], block_size: int) -> None:
        for spec in specs:
            if spec.dtype not in TYPES or spec.device != "cpu":
                raise UnsupportedAttention(
                    f"Layer {spec.name} keeps K and V in {spec.dtype} on {spec.device}; attention backend "
                    f"{self.name!r} keeps float32, bfloat16 and float16 on the CPU."
                )
        places = cache_places(specs, num_blocks, block_size)
        self.layers = [LayerCall(spec, place, block_size) for spec, place in zip(specs, places, strict=True)]

    def plan(self, batch: Batch) -> None:
        self._batch, self.num_tokens = batch, batch.num_tokens
        self._starts = torch.tensor(batch.query_starts, dtype=torch.int64)
        self._contexts = torch.tensor(batch.context_lens, dtype=torch.int64)
        self._steps: dict[Reach, StepCall] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, args: AttentionArgs) -> Tensor:
        call = self.layers[layer]
        facts = (q.shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype)
        if args is not call.args or facts != call.facts:
            q, k, v = call.prepare(self.name, q, k, v, args, facts)
        step = self.step_of(call.spec.reach)
        tokens, heads, _ = q.shape
        if tokens != self.num_tokens:
            raise CoreError(f"Layer {call.spec.name} was given {tokens} tokens of a step of {self.num_tokens}.")
        out = q.new_empty((tokens, heads, v.shape[2]))
        failure = self._attend(
            self.set, call.address, step.address, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        )
        if failure:
            raise attention_error(failure, call.spec)
        return out

    def step_of(self, reach: Reach) -> StepCall:
        """Return the step as layers of one reach see it."""
        found = self._steps.get(reach)
        if found is None:
            found = self._steps[reach] = make_step(self._batch.places(reach), self._starts, self._contexts)
        return found


def attention_error(failure: int, spec: KVSpec) -> Exception:
    """Return what a failure of the library means for a layer."""
    if failure == 1:
        return MemoryError(f"no memory for what attention of layer {spec.name} adds up")
    return CoreError(f"The step's block tables or slots name blocks that layer {spec.name} does not have.")
