"""From a checkpoint to the fastest tier that is right for it. The module is loaded once and handed down the tiers."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from core.contracts import Checkpoint, Model, Refusal
from core.errors import CheckpointError, CoreError
from core.layers import give_kernels, pack_linears, unpack_linears
from core.memory import letting_go
from core.model_loader import BuildContext
from core_hf_fallback.alike import Alike, NotAlike, find_alike
from core_hf_fallback.blame import is_ours
from core_hf_fallback.cache import CacheModel, Stepper
from core_hf_fallback.head_screen import put_screen
from core_hf_fallback.interface import bind, bindings_of, configs_of
from core_hf_fallback.load import load_module
from core_hf_fallback.module_state import ModuleState
from core_hf_fallback.paged import NotPaged, PagedModel, logits_of
from core_hf_fallback.patches.calls import LinearCalls, linear_calls
from core_hf_fallback.patches.patcher import Patcher
from core_hf_fallback.probe import DRAWS_IN_HALF, LONG, SHORT, Probe, layout_for, rows_difference, run_rows
from core_hf_fallback.ropes import Ropes
from core_hf_fallback.rows import RowsModel
from core_hf_fallback.state import CannotBatch
from core_hf_fallback.versions import warn_if_untested

logger = logging.getLogger("core_serve.transformers")
SHARED = "core_hf_fallback.module"
DEFAULT_MAX_LEN = 2048


class Loaded:
    """A module, what it looks up for attention by itself, and the plain logits that every tier has to match."""

    def __init__(self, module: nn.Module, max_len: int) -> None:
        self.module = module
        self.ropes = Ropes(module, max_len)
        self.own_attention = {id(config): config._attn_implementation for config in configs_of(module)}
        self.counts_tokens = False  # it takes positions from a count of tokens, which padding would falsify
        self.embedding_size = embedding_size(module)
        self.layout = layout_for(module, max_len)
        self.alike = find_alike(module, configs_of(module)) if not self.ropes else None

    @cached_property
    def probe(self) -> Probe:
        """What the module itself gives, with all its layers."""
        found: list[Probe] = []
        # Some models keep state in their modules; it is put back, so that no tier finds the probe's.
        ModuleState(self.module).learn(lambda: found.append(self._plain_probe()))
        return found[0]

    def probe_of_few(self, alike: Alike) -> Probe:
        """What the module gives with one layer of each kind. Raises NotAlike if that cannot be asked."""
        found: list[Probe] = []
        state = ModuleState(self.module)
        with alike.others_let_through(self.module):
            state.learn(lambda: found.append(self._plain_probe()))
        if state.places:
            raise NotAlike("it keeps state in its modules")
        return found[0]

    def _plain_probe(self) -> Probe:
        """Raises CheckpointError with the model's own words if it fails on a text alone."""
        if self.layout is SHORT:
            try:
                return self._probe_of(input_embedding(self.module), together=True)
            except Exception as error:  # remote code may take no more than one text at a time
                if is_ours(error, self.module):
                    raise
        try:
            return self._probe_of(input_embedding(self.module) if self.layout is LONG else None, together=False)
        except Exception as error:
            if is_ours(error, self.module):
                raise
            raise CheckpointError(
                f"{type(self.module).__name__} itself fails on {self.layout.longest} tokens: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _probe_of(self, embedding: nn.Module | None, together: bool) -> Probe:
        half = any(weight.dtype in (torch.bfloat16, torch.float16) for weight in self.module.parameters())
        draws = DRAWS_IN_HALF if half else 1
        return Probe.of(self.layout, self.plain_logits, self.embedding_size, embedding, together, draws)

    @cached_property
    def movement(self) -> float:
        """How far the module's own logits move when its embeddings move by a bit, in their spread."""
        found: list[float] = []
        ModuleState(self.module).learn(lambda: found.append(self.probe.plain_movement(self.plain_logits)))
        return found[0]

    @property
    def vocab_size(self) -> int:
        return next(iter(self.probe.wanted.values())).shape[-1]

    def plain_logits(self, ids: Tensor) -> Tensor:
        """ids [texts, tokens] -> logits [texts, tokens, vocab]."""
        ids = ids.to(next(self.module.parameters()).device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if "position_ids" in inspect.signature(self.module.forward).parameters:
            try:
                return logits_of(self.module(input_ids=ids, use_cache=False, position_ids=positions)).cpu()
            except Exception as error:  # the model's code: some modules take positions of certain lengths only
                if is_ours(error, self.module):
                    raise
        return logits_of(self.module(input_ids=ids, use_cache=False)).cpu()

    def restore_attention(self) -> None:
        for config in configs_of(self.module):
            config._attn_implementation = self.own_attention[id(config)]


def build_tier(tier: str, checkpoint: Checkpoint, context: BuildContext) -> Model | Refusal:
    """Build one tier, or refuse with what the probe found."""
    with context.stopwatch.on("probing"):
        built = _build_tier(tier, checkpoint, context)
    if not isinstance(built, Refusal):
        logger.info("probed %s: right (%s)", built.impl_name, context.stopwatch)
    return built


def _build_tier(tier: str, checkpoint: Checkpoint, context: BuildContext) -> Model | Refusal:
    max_len = context.options.max_model_len or checkpoint.spec.max_context or DEFAULT_MAX_LEN
    loaded = context.shared.get(SHARED)
    if loaded is None:
        warn_if_untested()
        with context.stopwatch.on("loading"):
            module = load_module(checkpoint, context)
        loaded = context.shared[SHARED] = Loaded(module, max_len)
    if tier != "cache" and loaded.ropes.unknown is not None:
        return Refusal(f"{loaded.ropes.unknown} rotates by the length of the longest text in the batch")
    if tier != "cache" and loaded.ropes.forgets_after is not None:
        return Refusal(f"its generate forgets a text that grows past {loaded.ropes.forgets_after} tokens")
    if tier == "paged":
        return _paged(loaded, context, letting_go(checkpoint))
    loaded.restore_attention()
    if tier == "rows" and loaded.ropes.restart_after is not None:
        return Refusal(f"it computes a text anew when it grows past {loaded.ropes.restart_after} tokens")
    if tier == "rows":
        return _rows(loaded, context, max_len)
    mixed = _mixed(loaded, context, max_len)
    return CacheModel(Stepper(loaded.module, max_len), loaded.vocab_size) if mixed is None else Refusal(mixed)


def _paged(loaded: Loaded, context: BuildContext, let_go: Callable[[], None]) -> Model | Refusal:
    """`let_go` gives back memory that weights took before they were copied (`core.memory.letting_go`)."""
    if loaded.alike is not None:
        few = _paged_by_few(loaded, loaded.alike, context, let_go)
        if few is not None:
            return few
        loaded.restore_attention()
    probe, binding = loaded.probe, bind(loaded.module)
    patcher: Patcher | None = None
    try:
        with linear_calls(loaded.module) as calls:
            model = PagedModel(loaded.module, binding, loaded.ropes, *probe.beginning(context.device))
        patcher = _patcher(loaded, calls, context, let_go)
        let_go()  # what was read so far: merging reads some of it again, and copies that

        def check() -> str | None:
            let_go()  # of what the recording forward took and gave back in pieces
            return probe.difference(model, context.make_attention(), context.device)

        wrong = patcher.settle(check)
    except (NotPaged, CoreError) as reason:
        wrong = str(reason)
    except Exception as error:  # the model's code: whatever it raises on a flat batch declines this tier
        if is_ours(error, loaded.module):
            raise
        wrong = f"the flat batch fails in the module: {type(error).__name__}: {error}"
    finally:
        loaded.counts_tokens = bool(binding.counting_layers)
    if wrong is not None or patcher is None:
        if patcher is not None:
            patcher.undo()  # the next tier checks for itself what packing changes
        return Refusal(wrong or "nothing was probed")
    return _finished(model, patcher, context)


def _paged_by_few(loaded: Loaded, alike: Alike, context: BuildContext, let_go: Callable[[], None]) -> Model | None:
    """Probe the first layer of each kind and do to all what is right for these; None if anything at all is amiss."""
    module = loaded.module
    binding = bind(module)
    patcher: Patcher | None = None
    try:
        probe = loaded.probe_of_few(alike)
        with alike.others_let_through(module, lambda: len(binding.masks)), linear_calls(module) as calls:
            model = PagedModel(module, binding, loaded.ropes, *probe.beginning(context.device))
        patcher = _patcher(loaded, calls, context, let_go)

        def check() -> str | None:
            with alike.others_let_through(module):
                return probe.difference(model, context.make_attention(), context.device)

        wrong = patcher.settle(check)
    except Exception as error:  # noqa: BLE001 - whatever it is, all layers are probed next, and that may raise
        wrong = f"{type(error).__name__}: {error}"
    if wrong is not None or patcher is None:
        logger.info("probing all layers, since with one of each kind: %s", wrong)
        if patcher is not None:
            patcher.undo()
        return None
    binding.carry_over(alike)
    patcher.carry_over(alike)
    logger.info("probed %d of %d layers, to which the others are alike", len(set(alike.like)), len(alike.like))
    return _finished(model, patcher, context)


def _patcher(loaded: Loaded, calls: LinearCalls, context: BuildContext, let_go: Callable[[], None]) -> Patcher:
    options = context.options
    return Patcher(loaded.module, calls, context.kernels, options.disable_patches, context.stopwatch, let_go)


def _finished(model: PagedModel, patcher: Patcher, context: BuildContext) -> PagedModel:
    model.forget_recording()
    model.screen = put_screen(model.module, context.kernels) if context.options.enable_head_screen else None
    model.features = replace(model.features, patches=tuple(patcher.counts))
    logger.info("patches: %s", patcher.summary)
    return model


def _pack(module: nn.Module, called: set[nn.Module], context: BuildContext) -> None:
    with context.stopwatch.on("packing"):
        pack_linears(module, kinds=(nn.Linear,), only=called, kernels=context.kernels)
    give_kernels(module, context.kernels)


@contextmanager
def calls_of(module: nn.Module, kind: type[nn.Module]) -> Iterator[set[nn.Module]]:
    """Collect the parts of exactly this kind that are called; some models only look at a linear's weight."""
    called: set[nn.Module] = set()
    parts = [part for part in module.modules() if type(part) is kind]
    handles = [part.register_forward_pre_hook(lambda part, _: called.add(part)) for part in parts]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _rows(loaded: Loaded, context: BuildContext, max_len: int) -> Model | Refusal:
    try:
        return _probed_rows(loaded, context, max_len)
    except CannotBatch as reason:
        return Refusal(str(reason))
    except Exception as error:  # the model's code: whatever it raises on a batch declines this tier
        if is_ours(error, loaded.module):
            raise
        return Refusal(f"the module fails on several requests at once: {type(error).__name__}: {error}")


def _run(
    model: CacheModel | RowsModel, loaded: Loaded, device: torch.device, only: str = "ABCD"
) -> list[dict[str, Tensor]]:
    """Run the probe's steps and leave nothing of them in the modules, where the next tier would find it."""
    try:
        return run_rows(model, loaded.layout, loaded.embedding_size, device, only)
    finally:
        model.stepper.module_state.reset()


def _probed_rows(loaded: Loaded, context: BuildContext, max_len: int) -> Model | Refusal:
    """Compare with one cache for each text: first with packed linears, then with plain ones if need be."""
    device = context.device
    mixed = _mixed(loaded, context, max_len) if loaded.layout is LONG else None
    if mixed is not None:
        return Refusal(mixed)
    stepper = Stepper(loaded.module, max_len)
    with calls_of(loaded.module, nn.Linear) as called:
        wanted = _run(CacheModel(stepper, loaded.vocab_size), loaded, device)
    wrong: str | None = None
    for packed in (True, False):
        if packed:
            _pack(loaded.module, called, context)
        else:
            unpack_linears(loaded.module)
            give_kernels(loaded.module, None)
        for padding in (True, False) if not loaded.counts_tokens else (False,):
            try:
                model = RowsModel(stepper, loaded.vocab_size, padding)
                found = _run(model, loaded, device)
                wrong = rows_difference(found, wanted, context.dtype, lambda: loaded.movement)
                if wrong is not None:
                    wrong = f"side by side, {wrong}"
                if wrong is not None and not padding:
                    wrong += ": texts of one length, without padding, are not kept apart in the module's own batch"
            except CannotBatch as reason:
                wrong = str(reason)
            if wrong is None:
                model.strict = False
                return model
    return Refusal(str(wrong))


def _mixed(loaded: Loaded, context: BuildContext, max_len: int) -> str | None:
    """Do requests in turn, each with a cache of its own, get what each gets from a copy of the module that is its own?

    They do not where a module keeps state in a place that is not found. Returns what is wrong, None if nothing is.
    """
    together = _run(CacheModel(Stepper(loaded.module, max_len), loaded.vocab_size), loaded, context.device)
    kept = [*loaded.module.parameters(), *bindings_of(loaded.module)]  # not copied
    for name in "ABCD" if loaded.layout is LONG else "AD":
        own = Stepper(copy.deepcopy(loaded.module, {id(one): one for one in kept}), max_len)
        alone = _run(CacheModel(own, loaded.vocab_size), loaded, context.device, only=name)
        wrong = rows_difference(alone, together, context.dtype, lambda: loaded.movement)
        if wrong is not None:
            return f"the module keeps state of a request where it is not found: beside others, {wrong}"
    return None


def input_embedding(module: nn.Module) -> nn.Module | None:
    found = getattr(module, "get_input_embeddings", lambda: None)()
    return found if isinstance(found, nn.Module) else None


def embedding_size(module: nn.Module) -> int:
    """The number of token ids that the model takes."""
    size = getattr(input_embedding(module), "num_embeddings", None)
    return int(size) if size else int(module.config.get_text_config().vocab_size)
