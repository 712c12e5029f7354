"""How near steps come to what the machine allows: the longer of their arithmetic and their reading, over their time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from core.bench.ceilings import Ceilings
from core.bench.costs import ModelCosts
from core.bench.offline import Step


def decode_bound(step: Step, costs: ModelCosts, ceilings: Ceilings) -> float:
    """Return the least seconds for a step in which every request runs one token."""
    flops = step.tokens * costs.flops_per_token + sum(map(costs.pair_flops, step.contexts))
    return ceilings.seconds(flops, costs.step_bytes(step.tokens) + sum(map(costs.kv_bytes, step.contexts)))


def linears_bound(step: Step, costs: ModelCosts, ceilings: Ceilings) -> float:
    """The same for the linears alone."""
    return ceilings.seconds(step.tokens * costs.flops_per_token, costs.step_bytes(step.tokens))


def attention_bound(step: Step, costs: ModelCosts, ceilings: Ceilings) -> float:
    """The same for attention alone."""
    return ceilings.seconds(sum(map(costs.pair_flops, step.contexts)), sum(map(costs.kv_bytes, step.contexts)))


def decode_share(steps: Sequence[Step], costs: ModelCosts, ceilings: Ceilings) -> float:
    """Return bound over measured, over the steps that decode; NaN if there are none."""
    decoding = [step for step in steps if step.decodes]
    if not decoding:
        return math.nan
    return sum(decode_bound(step, costs, ceilings) for step in decoding) / sum(step.seconds for step in decoding)


def prefill_bound(steps: Sequence[Step], lengths: Sequence[int], costs: ModelCosts, ceilings: Ceilings) -> float:
    """Return the least seconds for the steps that run chunks of prompts of these lengths.

    The rows that decode in the same steps are left out, which makes it a little too low.
    """
    flops = sum(costs.prefill_flops(length) for length in lengths)
    return ceilings.seconds(flops, sum(costs.step_bytes(step.tokens) for step in steps if step.prefill_tokens))


def prefill_share(steps: Sequence[Step], lengths: Sequence[int], costs: ModelCosts, ceilings: Ceilings) -> float:
    """Return that bound over the time measured; NaN if there are no such steps."""
    seconds = sum(step.seconds for step in steps if step.prefill_tokens)
    return prefill_bound(steps, lengths, costs, ceilings) / seconds if seconds else math.nan
