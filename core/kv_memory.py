"""How many K/V blocks of which kind: what was asked for, else what the memory holds, at most what can ever be used."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.config import EngineConfig
from core.contracts import KVSpec
from core.device import DeviceModule
from core.errors import ConfigError
from core.reach import Reach
from core.window_blocks import WindowPool, most_blocks

logger = logging.getLogger("core_serve")
HOST_BYTES = 2 * 1024**3  # for K/V on a CPU, where nothing else is asked for
DEFAULT_FRACTION = 0.88  # of a GPU's memory
GPU_SPARE = 4  # a GPU's memory has no other use, so finished texts are kept as long as it holds them


@dataclass(frozen=True)
class KVMemory:
    """The sizes of all pools."""

    num_blocks: int  # of the text's own pool, for layers that look back to the beginning
    windows: dict[Reach, int]  # blocks by reach, for layers that give old ones back

    def by_layer(self, specs: Iterable[KVSpec]) -> list[int]:
        """Return the number of blocks that each layer's cache has."""
        return [self.windows.get(spec.reach, self.num_blocks) for spec in specs]

    def pools(self, block_size: int) -> list[WindowPool]:
        return [WindowPool(reach, count, block_size) for reach, count in self.windows.items()]


def kv_bytes(config: EngineConfig, device: DeviceModule) -> int:
    """Return the bytes that K/V may take, once the weights are loaded. Raises ConfigError if there are none.

    On a GPU weights and K/V take `mem_fraction_static` of the memory; the rest is for a step's own tensors.
    """
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory
    if not device.stages:
        if config.mem_fraction_static is not None:
            raise ConfigError("mem_fraction_static is for GPUs; on a CPU size the K/V memory with --kv-cache-memory.")
        return HOST_BYTES
    free, total = device.memory()
    fraction = config.mem_fraction_static or DEFAULT_FRACTION
    left = free - round(total * (1 - fraction))
    if left <= 0:
        raise ConfigError(
            f"{total - free} of the device's {total} bytes are taken, by weights and by others, and "
            f"mem_fraction_static {fraction} leaves none for K/V. Give a larger --mem-fraction-static, or a smaller "
            "model."
        )
    return left


def size_memory(
    config: EngineConfig, specs: Sequence[KVSpec], max_model_len: int, tokens_a_step: int, memory: int, spare: int = 1
) -> KVMemory:
    """Choose the sizes for a model. Raises ConfigError if not even one block fits into `memory` bytes.

    `tokens_a_step`: the most tokens that a step may add to the cache. `spare`: how many times what runs at a time may
    be kept, for the prefix cache's sake.
    """
    per_request = -(-max_model_len // config.block_size)
    usable = per_request * config.max_num_seqs * spare
    sizes = _Sizes(config, specs, tokens_a_step)
    if config.num_blocks is not None:
        return sizes.memory(config.num_blocks)
    held = sizes.most_that_fit(usable, memory)
    if held < 1:
        raise ConfigError(
            f"kv_cache_memory of {memory} bytes does not hold one block of {config.block_size} tokens "
            f"({sizes.bytes(1)} bytes). Give more with --kv-cache-memory."
        )
    if held < per_request:
        logger.warning(
            "K/V memory holds %d tokens, fewer than the model's %d: longer requests will be refused. "
            "Give more with --kv-cache-memory or set a smaller --max-model-len.", held * config.block_size,
            max_model_len,
        )  # fmt: skip
    return sizes.memory(held)


class _Sizes:
    """What so many blocks of text take."""

    def __init__(self, config: EngineConfig, specs: Sequence[KVSpec], tokens_a_step: int) -> None:
        self.block_bytes: dict[Reach, int] = {}
        for spec in specs:
            token = spec.num_kv_heads * (spec.k_dim + spec.v_dim) * spec.dtype.itemsize
            self.block_bytes[spec.reach] = self.block_bytes.get(spec.reach, 0) + token * config.block_size
        self.most = {
            reach: most_blocks(reach, config.block_size, config.max_num_seqs, tokens_a_step)
            for reach in self.block_bytes
            if reach.is_bounded
        }

    def memory(self, num_blocks: int) -> KVMemory:
        """A reach that would save nothing shares the text's blocks."""
        return KVMemory(num_blocks, {reach: most for reach, most in self.most.items() if most < num_blocks})

    def bytes(self, num_blocks: int) -> int:
        windows = self.memory(num_blocks).windows
        return sum(size * windows.get(reach, num_blocks) for reach, size in self.block_bytes.items())

    def most_that_fit(self, wanted: int, memory: int) -> int:
        """Bisect for the largest number of blocks, at most `wanted`, that `memory` bytes hold."""
        low, high = 0, wanted
        while low < high:
            middle = (low + high + 1) // 2
            if self.bytes(middle) <= memory:
                low = middle
            else:
                high = middle - 1
        return low
