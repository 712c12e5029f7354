"""ServedInfo: core.engine.EngineInfo for the server's process, which loads neither core.engine nor torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core.engine import EngineInfo


@dataclass(frozen=True)
class ServedInfo:
    """The fields of EngineInfo, one for one; see there."""

    model_name: str
    model_path: str
    impl_name: str
    attention_name: str
    dtype: str
    device: str
    max_model_len: int  # tokens
    vocab_size: int
    num_blocks: int
    block_size: int  # tokens
    prefix_caching: bool
    quantization: str | None
    plugins: tuple[tuple[str, str], ...]  # (name, version)
    explanation: str

    @classmethod
    def of(cls, info: EngineInfo | ServedInfo) -> ServedInfo:
        return info if isinstance(info, cls) else cls(**asdict(info))
