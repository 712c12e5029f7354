"""A GPTQ checkpoint as a stream of weights (Frantar et al. 2022). weight = (code - zero) * scale.

qweight   int32 [in / n, out], n = 32 / bits codes a word, the first in the lowest bits
qzeros    int32 [groups, out / n], likewise along the output; in v1 the zero less one
scales    float16 [groups, out]
g_idx     int32 [in], the group of each column: j // group_size, or in another order with desc_act (columns by
          importance). Groups need not be of one size: the last may be smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor

from core.contracts import Checkpoint
from core.errors import CheckpointError
from core.layers import AffineTensor, pack_codes, unpack_codes
from core.quant_weights import as_its_module_has_it, by_module, located, read_part, read_scales
from core_quant_gptq.settings import BITS, GptqSettings

PARTS = ("qweight", "qzeros", "scales", "g_idx")


class GptqMethod:
    """A `core.contracts.QuantMethod`."""

    name = "gptq"
    on_the_fly = False

    def __init__(self, settings: GptqSettings) -> None:
        self.settings = settings

    def tensors(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield quantized weights and whatever the file keeps in floats."""
        modules, others = by_module(checkpoint.tensor_names(), PARTS)
        plain = set(others)
        for name in others:
            yield name, checkpoint.tensor(name)
        for module, found in modules.items():
            if f"{module}.weight" in plain:
                raise CheckpointError(f"{module} has a weight in floats and a quantized one in {checkpoint.spec.path}.")
            for part in ("qweight", "qzeros", "scales"):
                if part not in found:
                    there = f"{module}.{sorted(found)[0]}"
                    raise CheckpointError(
                        f"Tensor '{module}.{part}' is missing. {located(checkpoint, there)} needs it."
                    )
            if self.settings.desc_act and "g_idx" not in found:
                where = located(checkpoint, f"{module}.qweight")
                raise CheckpointError(f"Tensor '{module}.g_idx' is missing. {where} needs it: desc_act is on.")
            weight = self._weight(checkpoint, module, "g_idx" in found, dtype)
            yield f"{module}.weight", as_its_module_has_it(checkpoint.spec, weight)

    def quantize(self, name: str, weight: Tensor) -> Tensor:
        raise NotImplementedError("GPTQ checkpoints come quantized")

    def _weight(self, checkpoint: Checkpoint, module: str, has_index: bool, dtype: torch.dtype) -> AffineTensor:
        qweight = read_part(checkpoint, f"{module}.qweight")
        where = located(checkpoint, f"{module}.qweight")
        if qweight.dtype != torch.int32 or qweight.dim() != 2:
            raise CheckpointError(f"{where} is {qweight.dtype} {list(qweight.shape)}; GPTQ has int32 [in / n, out].")
        index = _index(checkpoint, f"{module}.g_idx") if has_index else None
        columns = len(index) if index is not None else qweight.shape[0] * 32 // self.settings.bits
        rows, bits = qweight.shape[1], qweight.shape[0] * 32 // max(columns, 1)
        if bits not in BITS or qweight.shape[0] * 32 != columns * bits:
            beside = f" that '{module}.g_idx' of the same file has" if index is not None else ""
            raise CheckpointError(
                f"{where} {list(qweight.shape)} does not hold 4 or 8 bits for the {columns} columns{beside}."
            )
        groups = self._groups(checkpoint, module, columns)
        scales = read_scales(checkpoint, f"{module}.scales", (groups, rows))
        words = read_part(checkpoint, f"{module}.qzeros", (groups, rows * bits // 32), torch.int32)
        zeros = self._zeros(words, bits)
        if self.settings.symmetric and _all_beside_the_middle(zeros, 1 << (bits - 1)):
            raise CheckpointError(
                f"{located(checkpoint, f'{module}.qzeros')} is {int(zeros[0, 0])} throughout, and the config says that "
                "weights are symmetric: its checkpoint_format (gptq or gptq_v2) is the other one."
            )
        if index is None:
            index = torch.arange(columns) // -(-columns // groups)
        if int(index.min()) < 0 or int(index.max()) >= groups:
            raise CheckpointError(f"{located(checkpoint, module + '.g_idx')} names groups outside [0, {groups}).")
        if self.settings.group_size is not None and not _evenly(index, self.settings.group_size):
            raise CheckpointError(
                f"{located(checkpoint, f'{module}.g_idx')} does not give each of {groups} groups the config's "
                f"{self.settings.group_size} columns."
            )
        codes = qweight.t().contiguous().view(torch.uint8)  # the file's words are core's packing, read along the row
        return _affine(codes, scales, zeros, index.long(), bits, dtype)

    def _groups(self, checkpoint: Checkpoint, module: str, columns: int) -> int:
        """As many as the config says; where it does not, as many as there are scales."""
        size = self.settings.group_size
        if size is not None:
            return -(-columns // (columns if size == -1 else size))
        return max(len(read_scales(checkpoint, f"{module}.scales")), 1)

    def _zeros(self, words: Tensor, bits: int) -> Tensor:
        """Int32 [groups, out / n] -> uint8 [groups, out].

        v1 subtracts one from each code of a word with the whole word's borrow, so it is added to the whole word.
        """
        ones = 0x11111111 if bits == 4 else 0x01010101
        return unpack_codes((words + ones * self.settings.zero_offset).view(torch.uint8), bits)


def _index(checkpoint: Checkpoint, name: str) -> Tensor:
    index = read_part(checkpoint, name)
    if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1 or not len(index):
        raise CheckpointError(f"{located(checkpoint, name)} is {index.dtype} {list(index.shape)}; right is int32 [in].")
    return index


def _all_beside_the_middle(zeros: Tensor, middle: int) -> bool:
    """True if all are one off, which is how symmetric zeros look that are read as those of the other version."""
    first = int(zeros[0, 0]) if zeros.numel() else middle
    return abs(first - middle) == 1 and bool((zeros == first).all())


def _evenly(index: Tensor, size: int) -> bool:
    """True if each group has `size` columns (-1: all), but for the last one, which has the rest."""
    size = len(index) if size == -1 else size
    counts = torch.bincount(index.long())
    return bool((counts[:-1] == size).all()) and int(counts[-1]) <= size


def _affine(codes: Tensor, scales: Tensor, zeros: Tensor, index: Tensor, bits: int, dtype: torch.dtype) -> AffineTensor:
    """Sort columns by group where they are not; halve groups until all are of one size.

    codes [out, bytes]; scales, zeros [groups, out]; index [in], the group of each column.
    """
    columns = len(index)
    order = None
    if bool((index.diff() < 0).any()):
        order = index.argsort(stable=True)
        codes = pack_codes(unpack_codes(codes, bits)[:, order], bits)
    sizes = torch.bincount(index, minlength=len(scales))
    size = gcd(*sizes.tolist())
    repeats = sizes // size
    parts = {
        "codes": codes,
        "scales": scales.repeat_interleave(repeats, 0).t().contiguous(),
        "zeros": zeros.repeat_interleave(repeats, 0).t().contiguous(),
    }
    return AffineTensor(parts, columns, dtype, bits=bits, group_size=size, order=order)
