"""NF4 and FP4: 16 values, and a largest magnitude for every block of the flattened weight (Dettmers 2023, QLoRA).

bitsandbytes puts the first of two codes into the high half of a byte; TableTensor has it in the low half. Its blocks
run over the ends of rows, so the scales are given to groups that lie within one row and one block.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from core.layers import TableTensor, pack_codes

BLOCK = 64  # weights that share a scale where nothing else is said
SMALLEST = 1e-38  # a block of zeros is divided by this
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # the codes from 8 on are their negatives


def table_of(kind: str) -> Tensor:
    """Return the 16 values of "nf4" or "fp4", float32, by their codes."""
    if kind == "nf4":
        return torch.tensor(NF4)
    half = torch.tensor(_FP4_TWELFTHS) / 12
    return torch.cat([half, -half])


def make_tensor(codes: Tensor, absmax: Tensor, table: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Return the weight of codes uint8 [out, in] and the scales float32 [blocks] of its flattened blocks.

    A TableTensor, or floats if a row is an odd number of weights, so that two rows share a byte.
    """
    group = gcd(codes.shape[-1], block)
    starts = torch.arange(0, codes.numel(), group, device=codes.device)
    scales = absmax[starts // block].view(codes.shape[0], -1)
    if codes.shape[-1] % 2:
        values = table.to(codes.device)[codes.int()].unflatten(-1, (-1, group))
        return (values * scales.unsqueeze(-1)).flatten(-2).to(dtype)
    parts = {"codes": pack_codes(codes, 4), "scales": scales}
    return TableTensor(parts, codes.shape[-1], dtype, group_size=group, table=tuple(table.tolist()))


def quantize(weight: Tensor, kind: str, block: int = BLOCK) -> Tensor:
    """Return weight [..., out, in] as bitsandbytes' `quantize_4bit` makes it, code by code."""
    if weight.dim() > 2:
        return torch.stack([quantize(one, kind, block) for one in weight])
    if weight.shape[-1] % 2:
        return weight
    codes, absmax = quantize_flat(weight.reshape(-1).float(), kind, block)
    return make_tensor(codes.view(weight.shape), absmax, table_of(kind), block, weight.dtype)


def quantize_flat(values: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """Return the codes uint8 [n] of values float32 [n], and the largest magnitude of each block."""
    table = table_of(kind).to(values.device)
    whole = len(values) // block * block
    blocks, rest = values[:whole].view(-1, block), values[whole:]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=SMALLEST)).unsqueeze(1)).flatten()
    if len(rest):  # bitsandbytes divides here, where it multiplies with the inverse above
        largest = rest.abs().amax().clamp(min=SMALLEST)
        absmax, scaled = torch.cat([absmax, largest[None]]), torch.cat([scaled, rest / largest])
    order = table.argsort()
    ordered = table[order]
    nearest = torch.bucketize(scaled.clamp(-1, 1), (ordered[:-1] + ordered[1:]) / 2)
    return order[nearest].to(torch.uint8), absmax
