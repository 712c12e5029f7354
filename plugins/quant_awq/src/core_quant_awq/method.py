"""An AWQ checkpoint as a stream of weights. weight = (code - zero) * scale, groups along a row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from core.contracts import Checkpoint
from core.errors import CheckpointError
from core.layers import AffineTensor
from core.quant_weights import as_its_module_has_it, by_module, located, read_part, read_scales
from core_quant_awq.packing import codes_of_gemm, codes_of_gemv, codes_of_gemv_fast, rows_of_gemm, zeros_of_gemv
from core_quant_awq.settings import AwqSettings

PARTS = ("qweight", "qzeros", "scales", "scaled_zeros")  # the last is llm-awq's word for offsets


class AwqMethod:
    """A `core.contracts.QuantMethod`."""

    name = "awq"
    on_the_fly = False

    def __init__(self, settings: AwqSettings) -> None:
        self.settings = settings

    def tensors(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield quantized weights and whatever the file keeps in floats (modules_to_not_convert, embeddings, norms)."""
        modules, others = by_module(checkpoint.tensor_names(), PARTS)
        for name in others:
            yield name, checkpoint.tensor(name)
        plain = set(others)
        for module, found in modules.items():
            if f"{module}.weight" in plain:
                raise CheckpointError(f"{module} has a weight in floats and a quantized one in {checkpoint.spec.path}.")
            self._check_parts(checkpoint, module, found)
            weight = _Reader(self.settings, checkpoint, module, found).weight(dtype)
            yield f"{module}.weight", as_its_module_has_it(checkpoint.spec, weight)

    def quantize(self, name: str, weight: Tensor) -> Tensor:
        raise NotImplementedError("AWQ checkpoints come quantized")

    def _check_parts(self, checkpoint: Checkpoint, module: str, found: set[str]) -> None:
        needed = {"qweight", "scales"}
        if self.settings.packing == "gemv_fast":
            needed |= set() if found & {"qzeros", "scaled_zeros"} else {"qzeros"}
        elif self.settings.zero_point:
            needed.add("qzeros")
        for part in sorted(needed - found):
            there = f"{module}.{sorted(found)[0]}"
            raise CheckpointError(f"Tensor '{module}.{part}' is missing. {located(checkpoint, there)} needs it.")


class _Reader:
    """One linear's tensors. Raises CheckpointError naming file and tensor for a shape or a type that does not fit."""

    def __init__(self, settings: AwqSettings, checkpoint: Checkpoint, module: str, found: set[str]) -> None:
        self.settings, self.checkpoint, self.module, self.found = settings, checkpoint, module, found

    def weight(self, dtype: torch.dtype) -> AffineTensor:
        qweight = self._integers("qweight", torch.int16 if self.settings.packing == "gemv_fast" else torch.int32)
        make = {"gemm": self._gemm, "gemv": self._gemv, "gemv_fast": self._gemv_fast}[self.settings.packing]
        parts, columns = make(qweight)
        return AffineTensor(parts, columns, dtype, bits=4, group_size=self.settings.group_size or columns)

    def _gemm(self, qweight: Tensor) -> tuple[dict[str, Tensor], int]:
        columns, rows = qweight.shape[0], qweight.shape[1] * 8
        groups = self._groups(columns)
        scales = self._scales("scales", (groups, rows)).t().contiguous()
        parts = {"codes": codes_of_gemm(qweight), "scales": scales}
        if "qzeros" in self.found:
            words = self._integers("qzeros", torch.int32, (groups, rows // 8))
            parts["zeros"] = rows_of_gemm(words).t().contiguous()
        return parts, columns

    def _gemv(self, qweight: Tensor) -> tuple[dict[str, Tensor], int]:
        rows, columns = qweight.shape[0], qweight.shape[1] * 8
        groups = self._groups(columns)
        width = self._width(groups)
        scales = self._scales("scales", (rows, width * 8))[:, :groups].contiguous()
        parts = {"codes": codes_of_gemv(qweight), "scales": scales}
        if "qzeros" in self.found:
            parts["zeros"] = zeros_of_gemv(self._integers("qzeros", torch.int32, (rows, width)), groups)
        return parts, columns

    def _gemv_fast(self, qweight: Tensor) -> tuple[dict[str, Tensor], int]:
        rows, columns = qweight.shape[0] * 4, qweight.shape[1]
        if columns % 64:
            raise CheckpointError(f"{self._where('qweight')} has {columns} columns, not a multiple of 64.")
        groups = self._groups(columns)
        shape = (self._width(groups) * 8, rows)
        offsets = "qzeros" if "qzeros" in self.found else "scaled_zeros"
        return {
            "codes": codes_of_gemv_fast(qweight),
            "scales": self._scales("scales", shape)[:groups].t().contiguous(),
            "offsets": self._scales(offsets, shape)[:groups].t().contiguous(),
        }, columns

    def _groups(self, columns: int) -> int:
        size = self.settings.group_size or columns
        if columns % size:
            raise CheckpointError(
                f"{self._where('qweight')} has {columns} columns, no multiple of the group size {size}."
            )
        return columns // size

    def _width(self, groups: int) -> int:
        """How many words of zeros a row of the gemv packings has: padded, the more so the smaller the groups are."""
        multiple = {64: 2, 32: 4}.get(self.settings.group_size or 0, 1)
        words = -(-groups // 8)
        return -(-words // multiple) * multiple

    def _integers(self, part: str, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Tensor:
        tensor = self._read(part, shape)
        if tensor.dtype != dtype or tensor.dim() != 2:
            raise CheckpointError(
                f"{self._where(part)} is {tensor.dtype} {list(tensor.shape)}; AWQ's {self.settings.packing} has "
                f"{dtype} of two dimensions there."
            )
        return tensor

    def _scales(self, part: str, shape: tuple[int, ...]) -> Tensor:
        return read_scales(self.checkpoint, f"{self.module}.{part}", shape)

    def _read(self, part: str, shape: tuple[int, ...] | None = None) -> Tensor:
        return read_part(self.checkpoint, f"{self.module}.{part}", shape)

    def _where(self, part: str) -> str:
        return located(self.checkpoint, f"{self.module}.{part}")
