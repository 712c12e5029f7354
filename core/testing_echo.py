"""A model without weights, and a plugin that serves it, for tests of what is around a model. In `core.testing`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.contracts import Bid, Checkpoint, KVSpec, ModelFeatures
from core.errors import CheckpointError
from core.hookspecs import hookimpl
from core.spec import ModelSpec
from core.testing_configs import VOCAB

if TYPE_CHECKING:
    from torch import Tensor

    from core.batch import Batch
    from core.config import EngineConfig
    from core.model_loader import BuildContext


class EchoModel:
    """A `core.contracts.Model` without weights or K/V: after token t it is nearly sure of t + 1, wrapping around."""

    impl_name = "echo"
    features = ModelFeatures()

    def __init__(self, vocab_size: int = VOCAB) -> None:
        self.vocab_size = vocab_size
        self.released: list[str] = []  # ids, in order: what a test may ask for

    def kv_specs(self) -> Sequence[KVSpec]:
        return []

    def forward(self, batch: Batch) -> Tensor:
        """Logits [rows, vocab]: 20 for the next token, 0 for all others."""
        import torch

        following = (batch.token_ids[batch.logit_rows] + 1) % self.vocab_size
        return 20.0 * torch.nn.functional.one_hot(following, self.vocab_size).float()

    def release(self, request_id: str) -> None:
        self.released.append(request_id)


@dataclass
class EchoCheckpoint:
    """A `core.contracts.Checkpoint` without tensors."""

    spec: ModelSpec

    def tensor_names(self) -> Sequence[str]:
        return []

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def tensor(self, name: str) -> Tensor:
        raise CheckpointError(f"The echo model has no tensor {name!r}.")


class EchoPlugin:
    """Serves EchoModel for the path "echo": `build_engine(config, PluginHost.load(extra={"echo": EchoPlugin()}))`."""

    CORE_API = (1, 0)

    def __init__(self, max_positions: int = 128) -> None:
        self.max_positions = max_positions

    @hookimpl
    def provide_checkpoint(self, path: str, options: EngineConfig) -> Checkpoint | None:
        if path != "echo":
            return None
        config = {"model_type": "echo", "vocab_size": VOCAB, "max_position_embeddings": self.max_positions}
        return EchoCheckpoint(ModelSpec(Path("echo"), "echo", config))

    @hookimpl
    def resolve_model_impl(self, spec: ModelSpec, options: EngineConfig) -> Bid[Any] | None:
        def build(checkpoint: Checkpoint, context: BuildContext) -> EchoModel:
            return EchoModel(VOCAB)

        return Bid("echo", 100, build) if spec.model_type == "echo" else None
