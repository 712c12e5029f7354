"""Which of transformers' causal language models are served right: all of them checked, several at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError
from core.supported_check import Checked, Steps, check, start_context
from core.supported_results import append_result, fingerprint, read_results


def causal_models() -> dict[str, str]:
    """Return transformers' causal language models: class by model type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))


def choose(only: Sequence[str]) -> dict[str, str]:
    """Return the chosen models, all if none is named. Raises ConfigError for a name that is none of them."""
    known = causal_models()
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ConfigError(
            f"transformers has no causal language model of type {', '.join(map(repr, unknown))}; "
            f"it has {len(known)}: {', '.join(known)}."
        )
    return {name: known[name] for name in only} if only else known


@dataclass(frozen=True)
class Survey:
    """How model types are checked."""

    jobs: int  # at a time
    results: Path | None  # what it holds of this very code and device is not checked again; what is found is appended
    seconds: float  # a step of a model type that takes longer is a finding
    device: str = "cpu"

    @property
    def code(self) -> str:
        """Return what its results count for."""
        return fingerprint() + ("" if self.device == "cpu" else f" on {self.device}")


def survey(models: Mapping[str, str], how: Survey, on_result: Callable[[Checked], None]) -> list[Checked]:
    """Check models, several at a time, but for those whose results are known; return all, in order."""
    code = how.code
    done = {found.model_type: found for found in read_results(how.results) if found.code == code}
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models only get slower with more
    context = start_context()
    with ThreadPoolExecutor(how.jobs) as pool:
        missing = {name: class_name for name, class_name in models.items() if name not in done}
        started = [
            pool.submit(check, name, made, code, Steps(context, how.seconds, how.device))
            for name, made in missing.items()
        ]
        try:
            for future in as_completed(started):
                found = future.result()
                done[found.model_type] = found
                append_result(how.results, found)
                on_result(found)
        except BaseException:  # Ctrl-C above all: what has not begun need not
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [done[name] for name in models]
