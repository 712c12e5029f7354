"""The layouts that most formats are brought into: steps of equal size, a table of 16 values, halves, float8.

codes     4 bit: uint8 [..., out, in / 2], weight 2j in the low half of byte j, weight 2j + 1 in the high half
          8 bit: uint8 [..., out, in]
groups    a row's weights [g * group_size, (g + 1) * group_size) share a scale; group_size divides in
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.layers.quantized import QuantizedTensor

ROWS = 256  # that are looked at together


class AffineTensor(QuantizedTensor):
    """weight = (code - zero) * scale, or code * scale + offset.

    Parts: `codes`; `scales` [..., out, groups] in any float dtype; and of these at most one: `zeros` uint8
    [..., out, groups], or `offsets` [..., out, groups] in a float dtype. With neither the zero is the middle code
    (8 or 128). Settings: `bits` (4 or 8), `group_size`, and `order` (None, or int64 [in]: code column j is the
    weight's column order[j], for formats that group columns by importance; [experts, in] of a stack).
    """

    @property
    def packing(self) -> str:  # type: ignore[override]
        return f"affine{self.settings['bits']}"

    def decode(self) -> Tensor:
        codes = unpack_codes(self.parts["codes"], self.settings["bits"]).float()
        grouped = codes.unflatten(-1, (-1, self.settings["group_size"]))
        scales = self.parts["scales"].float().unsqueeze(-1)
        if "offsets" in self.parts:
            found = grouped * scales + self.parts["offsets"].float().unsqueeze(-1)
        else:
            found = (grouped - self._zeros()) * scales
        return in_order(found.flatten(-2), self.settings.get("order"))

    def _zeros(self) -> Tensor | float:
        zeros = self.parts.get("zeros")
        return float(1 << (self.settings["bits"] - 1)) if zeros is None else zeros.float().unsqueeze(-1)


class TableTensor(QuantizedTensor):
    """weight = table[code] * scale. Parts: `codes` of 4 bits, `scales` [..., out, groups]; settings: `group_size`, and
    `table`, a tuple of 16 floats."""

    packing = "table4"

    def decode(self) -> Tensor:
        table = torch.tensor(self.settings["table"], dtype=torch.float32, device=self.device)
        values = table[unpack_codes(self.parts["codes"], 4).int()]
        grouped = values.unflatten(-1, (-1, self.settings["group_size"]))
        found: Tensor = (grouped * self.parts["scales"].float().unsqueeze(-1)).flatten(-2)
        return found


class HalfTensor(QuantizedTensor):
    """A weight in halves that modules see as float32: the very same numbers in half the memory.

    Part: `values`, float16 or bfloat16 [..., out, in].
    """

    packing = "half"

    def decode(self) -> Tensor:
        return self.parts["values"].float()


def as_halves(weight: Tensor) -> Tensor | None:
    """Return a float32 matrix [out, in] in bfloat16 or float16, if one of them has each of its numbers; else None.

    Checkpoints are mostly of two bytes, and what a CPU computes with in float32 is such a one, widened.
    """
    for dtype in (torch.bfloat16, torch.float16):
        made = torch.empty(weight.shape, dtype=dtype)
        if all(_narrowed(weight[at : at + ROWS], made[at : at + ROWS]) for at in range(0, len(weight), ROWS)):
            return made
    return None


def _narrowed(numbers: Tensor, to: Tensor) -> bool:
    """Fill `to` with the numbers; True if they are the same."""
    to.copy_(numbers)
    return torch.equal(to.float(), numbers)


class Float8Tensor(QuantizedTensor):
    """weight = float8 value * scale. Parts: `codes`, the values' bytes as uint8 [..., out, in], and `scales`
    [..., out, blocks] in a float dtype; settings: `format` ("float8_e4m3fn", "float8_e5m2"), and `block`: a row's
    weights [b * block, (b + 1) * block) share a scale; the last block may be shorter."""

    packing = "float8"

    def decode(self) -> Tensor:
        values = self.parts["codes"].view(getattr(torch, self.settings["format"])).float()
        scales, block = self.parts["scales"].float(), self.settings["block"]
        if scales.shape[-1] > 1:
            scales = scales.repeat_interleave(block, -1)[..., : self.in_features]
        return values * scales


def float8_tensor(values: Tensor, scales: Tensor, block: tuple[int, int] | None, dtype: torch.dtype) -> Float8Tensor:
    """Make one of values [..., out, in] in a float8 dtype and their scales, which are multiplied with.

    scales are [..., ceil(out / rows), ceil(in / columns)] for a `block` of (rows, columns); without one they are of
    any shape that spreads over [..., out, 1]. The scale of a block is repeated for each of its rows.
    """
    *leading, out, width = values.shape
    if scales.dtype.itemsize == 1:  # float8_e8m0fnu: powers of two
        scales = scales.float()
    if block is None:
        scales = scales.reshape(1, 1) if scales.numel() == 1 else scales
        scales = scales.expand(*leading, out, 1).contiguous()
    else:
        scales = scales.repeat_interleave(block[0], -2)[..., :out, :]
    parts = {"codes": values.view(torch.uint8), "scales": scales}
    settings = {"format": str(values.dtype).removeprefix("torch."), "block": width if block is None else block[1]}
    return Float8Tensor(parts, width, dtype, **settings)


def unpack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., bytes] -> uint8 [..., in], one code each."""
    if bits == 8:
        return codes
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2)


def pack_codes(values: Tensor, bits: int) -> Tensor:
    """Codes [..., in], each below 2 ** bits -> uint8 [..., in * bits / 8]."""
    values = values.to(torch.uint8)
    return values if bits == 8 else values[..., 0::2] | (values[..., 1::2] << 4)


def in_order(columns: Tensor, order: Tensor | None) -> Tensor:
    """Put column j of `columns` [..., in] at place order[j]; of a stack, order may be [experts, in]."""
    if order is None:
        return columns
    found = torch.empty_like(columns)
    if order.dim() > 1:
        return found.scatter_(-1, order.unsqueeze(1).expand_as(columns), columns)
    found[..., order] = columns
    return found
