"""Applies the patches of one module, lets a check judge them, and leaves out those that it finds wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from weakref import WeakSet

from torch import nn

from core.kernel_contracts import Kernels
from core.layers import give_kernels, pack_linears, unpack_linears
from core.memory import trim
from core.model_loader import Stopwatch
from core_hf_fallback.alike import Alike
from core_hf_fallback.patches.attention_block import fuse_attention
from core_hf_fallback.patches.calls import LinearCalls
from core_hf_fallback.patches.child_lookup import enter_children
from core_hf_fallback.patches.decoder_layer import fuse_layers
from core_hf_fallback.patches.gated_mlp import fuse_gates
from core_hf_fallback.patches.grouped_experts import group_experts
from core_hf_fallback.patches.layer_stack import stack_layers
from core_hf_fallback.patches.merged_linears import Merged, merge_linears
from core_hf_fallback.patches.rms_norm import fuse_norms

logger = logging.getLogger("core_serve.transformers")
Undo = Callable[[], None]
Check = Callable[[], str | None]  # what is wrong, None if nothing is


@dataclass(frozen=True)
class Rule:
    name: str
    apply: Callable[[nn.Module, LinearCalls, Kernels | None], Sequence[Undo]]  # one for each place that was changed
    after_packing: bool = True  # False: it makes linears that are to be packed


RULES = (
    Rule("merged-linears", merge_linears, after_packing=False),
    Rule("rms-norm", fuse_norms),
    Rule("gated-mlp", fuse_gates),
    Rule("grouped-experts", group_experts),
    Rule("attention-block", fuse_attention),
    Rule("decoder-layer", fuse_layers),
    Rule("layer-stack", stack_layers),
    Rule("child-lookup", enter_children),
)


class Patcher:
    """Patches a module and packs its linears, and can take both back."""

    def __init__(
        self,
        module: nn.Module,
        calls: LinearCalls,
        kernels: Kernels | None = None,
        disabled: Collection[str] = (),
        stopwatch: Stopwatch | None = None,
        let_go: Callable[[], None] = trim,
    ) -> None:
        """`let_go` gives back memory that weights took before they were merged or moved."""
        self.let_go = let_go
        self.module, self.calls, self.kernels = module, calls, kernels
        self.stopwatch = stopwatch or Stopwatch()
        self.rules = [rule for rule in RULES if rule.name not in disabled]
        self.counts: dict[str, int] = {}  # places by the name of the rule that changed them
        self._undo: list[Undo] = []

    def settle(self, check: Check) -> str | None:
        """Apply all rules but those that `check` finds wrong; return what is wrong with the module without any.

        Whatever `check` raises without patches is raised. On an answer the module is as it was.
        """
        self.apply(self.rules)
        tried = [rule for rule in self.rules if rule.name in self.counts]
        wrong = _try(check) if tried else check()
        if wrong is None:
            return None
        if tried:
            self.apply([])
            wrong = check()
        if wrong is None:
            self._leave_out_wrong(tried, check)
        else:
            self.undo()
        return wrong

    def _leave_out_wrong(self, rules: Sequence[Rule], check: Check) -> None:
        kept: list[Rule] = []
        for rule in rules:
            self.apply([*kept, rule])
            wrong = _try(check)
            if wrong is None:
                kept.append(rule)
            else:
                logger.warning("patch %s is left out, it changes this model's results: %s", rule.name, wrong)
        self.apply(kept)

    def apply(self, rules: Sequence[Rule]) -> None:
        """Make these the patches of the module, packed."""
        self.undo()
        self._add(rules)

    def carry_over(self, alike: Alike) -> None:
        """Patch all layers as those were that they are like; what joins layers has to see all of them at once."""
        rules = [rule for rule in self.rules if rule.name in self.counts]
        self.calls.carry_over(alike)
        self.apply(rules)

    def _add(self, rules: Sequence[Rule]) -> None:
        with self.stopwatch.on("patching"):
            for rule in rules:
                if not rule.after_packing:
                    self._apply_one(rule)
        with self.stopwatch.on("packing"):
            self.let_go()
            pack_linears(self.module, (nn.Linear,), self._called(), self.kernels, self.let_go)
        with self.stopwatch.on("patching"):
            give_kernels(self.module, self.kernels)
            for rule in rules:
                if rule.after_packing:
                    self._apply_one(rule)

    def _apply_one(self, rule: Rule) -> None:
        undo = rule.apply(self.module, self.calls, self.kernels)
        self._undo += undo
        if undo:
            self.counts[rule.name] = self.counts.get(rule.name, 0) + len(undo)

    def _called(self) -> WeakSet[nn.Module]:
        """The linears to pack: those that are called; of some a module only looks at the weight.

        Weak, so that each plain weight can go as soon as it is packed.
        """
        called = WeakSet(self.module.get_submodule(path) for path in self.calls.counts)
        called.update(part.linear for part in self.module.modules() if isinstance(part, Merged))
        return called

    def undo(self) -> None:
        """Put the module's own parts back, with the very same weights."""
        unpack_linears(self.module)
        give_kernels(self.module, None)
        while self._undo:
            self._undo.pop()()
        self.counts.clear()

    @property
    def summary(self) -> str:
        return ", ".join(f"{name} ({count})" for name, count in self.counts.items()) or "none"


def _try(check: Check) -> str | None:
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - a patch may break anybody's code in any way; tried without it next
        return f"{type(error).__name__}: {error}"
