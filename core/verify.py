"""Is a served model the model? Runs it beside plain transformers and says where the two depart.

    report = verify("path/to/model", model_impl="my_models")
    assert report.passed, report.problems

Known texts, of lengths around the edges of blocks, windows and chunks, go through the real engine together: prompts in
chunks, their last tokens decoded one by one. Logits and the hidden states after every layer are compared with what
plain transformers gives for each text alone. Then both continue a few of the texts greedily.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.config import EngineConfig
from core.contracts import Checkpoint
from core.engine import Engine
from core.engine_build import build_engine, choose_device, choose_dtype, choose_model_len, demo_path
from core.errors import ConfigError
from core.plugins import PluginHost
from core.verify_compare import Comparison, compare_answer
from core.verify_layers import LayerRecorder, decoder_layers
from core.verify_plain import PlainAnswer, PlainModel, PlainText, load_plain
from core.verify_report import GreedyResult, VerifyReport
from core.verify_served import ForcedRun, greedy
from core.verify_texts import edge_lengths, random_texts, slices_of

AGAINST = "transformers"
TIME_LIMIT = 300.0  # seconds
TOLERANCE = {"float32": 1e-3}  # standard deviations that rounding alone can move a logit or a hidden state
HALF_TOLERANCE = 0.25
GREEDY_PROMPTS, GREEDY_TOKENS = 3, 8
NO_LAYERS = "the served model exposes no list of as many layers as transformers' module has"


@dataclass(frozen=True)
class _Plain:
    """What plain transformers said; its module is gone by the time the served model is loaded."""

    texts: list[PlainText]
    skipped: list[int]
    answers: list[PlainAnswer]
    layer_names: list[str]


def verify(
    model: str | Path | None = None,
    *,
    text: str | None = None,
    tolerance: float | None = None,
    time_limit: float = TIME_LIMIT,
    layers: bool = True,
    against: str = AGAINST,
    host: PluginHost | None = None,
    **options: Any,
) -> VerifyReport:
    """Compare a served model with plain transformers. `options` are EngineConfig's.

    The texts are random ids, or parts of `text`; those that `time_limit` (seconds, loading not counted) leaves no time
    for are named in the report. Unless options say otherwise, a step runs at most four blocks and three tokens, so that
    prompts are cut. Raises CoreError if the model cannot be loaded or served.
    """
    if against != AGAINST:
        raise ConfigError(f"A model can be verified against {AGAINST!r}, not {against!r}. Leave `against` out.")
    start = time.monotonic()
    host = host or PluginHost.load(disable=options.get("disable_plugins", ()))
    config = _config(model, text, options)
    checkpoint = host.open_checkpoint(config.model or demo_path(), config)
    dtype = str(choose_dtype(config.dtype, checkpoint.spec, _device(config))).removeprefix("torch.")
    limit = TOLERANCE.get(dtype, HALF_TOLERANCE) if tolerance is None else tolerance
    plain = _ask_plain(checkpoint, config, host, text, time_limit / 2)
    engine = build_engine(replace(config, num_blocks=_blocks(plain, config.block_size)), host)
    try:
        return _compare(engine, plain, limit, time_limit / 2, layers, start)
    finally:
        engine.close()


def _config(model: str | Path | None, text: str | None, options: dict[str, Any]) -> EngineConfig:
    config = EngineConfig.from_options(model=None if model is None else str(model), **options)
    if "max_num_batched_tokens" not in options:
        config = replace(config, max_num_batched_tokens=4 * config.block_size + 3)
    return config if text is not None else replace(config, skip_tokenizer_init=True)


def _device(config: EngineConfig) -> Any:
    import torch

    return torch.device(choose_device(config.device))


def _blocks(plain: _Plain, block_size: int) -> int:
    """Enough for all texts at once, one block of headroom each; a few more than that for a warm prefix cache."""
    return sum(-(-(len(text.ids) + GREEDY_TOKENS) // block_size) + 2 for text in plain.texts) + 8


# ------------------------------------------------------------------------------------------------ plain


def _ask_plain(
    checkpoint: Checkpoint, config: EngineConfig, host: PluginHost, text: str | None, seconds: float
) -> _Plain:
    spec, device = checkpoint.spec, _device(config)
    dtype, method = choose_dtype(config.dtype, spec, device), host.quant_method(spec, config)
    module = load_plain(checkpoint, dtype, device, config.trust_remote_code, method)
    longest = choose_model_len(config, spec) - GREEDY_TOKENS
    if longest < 1:
        raise ConfigError(f"max_model_len must be more than {GREEDY_TOKENS} to verify a model; give a larger one.")
    lengths = edge_lengths(spec, config.block_size, longest)
    if text is None:
        texts = random_texts(lengths, module.vocab_size)
    else:
        texts = slices_of(_encode(text, checkpoint, config, host), lengths)
    done, skipped = module.run(texts, seconds)
    return _Plain(done, skipped, _answers(module, done), module.layer_names if done[0].hidden else [])


def _encode(text: str, checkpoint: Checkpoint, config: EngineConfig, host: PluginHost) -> list[int]:
    ids = host.tokenizer(checkpoint.spec, config).encode(text)
    if not ids:
        raise ConfigError("The text to verify with has no tokens; give a longer one, or none for random tokens.")
    return ids


def _answers(module: PlainModel, texts: Sequence[PlainText]) -> list[PlainAnswer]:
    """Continue the shortest text, the longest, and some between."""
    last = len(texts) - 1
    chosen = sorted({last * number // (GREEDY_PROMPTS - 1) for number in range(GREEDY_PROMPTS)})
    return [module.answer(texts[number].ids, GREEDY_TOKENS) for number in chosen]


# ------------------------------------------------------------------------------------------------ served


def _compare(
    engine: Engine, plain: _Plain, tolerance: float, seconds: float, wants_layers: bool, start: float
) -> VerifyReport:
    recorder = decoder_layers(engine.model, len(plain.layer_names)) if wants_layers and plain.layer_names else None
    comparison = Comparison(plain.texts, plain.layer_names if recorder else [], tolerance)
    note = _run(engine, plain, recorder, comparison, seconds)
    if recorder is None:
        note = _why_no_layers(plain, wants_layers)
    info = engine.info
    results = _greedy(engine, plain)
    lengths = comparison.lengths
    skipped = [len(text.ids) for text in plain.texts if len(text.ids) not in lengths] + plain.skipped
    return VerifyReport(
        model=info.model_path,
        impl_name=info.impl_name,
        attention_name=info.attention_name,
        dtype=info.dtype,
        device=info.device,
        against=AGAINST,
        tolerance=tolerance,
        lengths=lengths,
        skipped=tuple(skipped),
        layers=comparison.layers(recorder.names) if recorder and note is None else (),
        layers_note=note,
        logits=comparison.logits(),
        greedy=results,
        seconds=time.monotonic() - start,
    )


def _why_no_layers(plain: _Plain, wants_layers: bool) -> str:
    if not wants_layers:
        return "it was not asked for"
    return NO_LAYERS if plain.layer_names else "transformers' module has no list of layers"


def _run(
    engine: Engine, plain: _Plain, recorder: LayerRecorder | None, comparison: Comparison, seconds: float
) -> str | None:
    """Run all texts together; then alone those whose hidden states could not be told apart. Returns why none could."""
    deadline = time.monotonic() + seconds
    numbered = [(number, text.ids) for number, text in enumerate(plain.texts)]
    together = ForcedRun(engine, recorder, comparison.take, deadline)
    complete = together.run(numbered)
    if recorder is None or not together.unseen or not complete:
        return None if complete or not together.unseen else "there was no time to run the texts one by one"
    seen: set[int] = set()

    def take(number: int, start: int, logits: Any, hidden: Any) -> None:
        if hidden is not None:
            seen.add(number)
            comparison.take_hidden(number, start, hidden)

    for number, ids in numbered:
        if number in together.unseen and not ForcedRun(engine, recorder, take, deadline).run([(number, ids)]):
            break
    return None if seen else "the outputs of the served layers are not [tokens, hidden]"


def _greedy(engine: Engine, plain: _Plain) -> tuple[GreedyResult, ...]:
    found = greedy(engine, [answer.prompt for answer in plain.answers], GREEDY_TOKENS)
    return tuple(compare_answer(answer, ids) for answer, ids in zip(plain.answers, found, strict=True))
