"""From the tensors of one module in a file to one quantized weight.

pack-quantized     weight_packed int32 [out, in * bits / 32], weight_shape [2], weight_scale [out, groups],
                   weight_zero_point int32 [out * bits / 32, groups] (or int8), weight_g_idx [in]: column -> group
others             weight int8 or float8 [out, in], weight_scale [out, groups], [out], [1] or of blocks,
                   weight_zero_point like weight_scale

Codes are stored with half their range added, so that the lowest is 0: four bits of an int32 are four bits of ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from core.layers import AffineTensor, QuantizedTensor, float8_tensor, pack_codes, unpack_codes
from core.quant_weights import wrong_with_scales
from core_quant_compressed_tensors.scheme import Scheme


class Misfit(ValueError):
    """A part of a weight is not what its scheme says; holds the part's name and what is wrong with it."""

    def __init__(self, part: str, problem: str) -> None:
        super().__init__(problem)
        self.part = part


def build_weight(parts: Mapping[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> QuantizedTensor:
    """Return the weight of a module's parts. Raises Misfit."""
    if "weight_packed" in parts or scheme.is_packed:
        return _packed(parts, scheme, dtype)
    values = _part(parts, "weight")
    if values.dim() != 2:
        raise Misfit("weight", f"has shape {list(values.shape)}; right is [out, in]")
    if scheme.is_float:
        return _floats(values, parts, scheme, dtype)
    if values.dtype != torch.int8:
        raise Misfit("weight", f"is {values.dtype}; right is torch.int8")
    return _affine((values.view(torch.uint8) ^ 128), values.shape[1], parts, _flat_zeros(parts), 8, scheme, dtype)


def _part(parts: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in parts:
        raise Misfit(name, "is missing")
    return parts[name]


def _scales(parts: Mapping[str, Tensor]) -> Tensor:
    scales = _part(parts, "weight_scale")
    problem = wrong_with_scales(scales)
    if problem is not None:
        raise Misfit("weight_scale", problem)
    return scales


def _packed(parts: Mapping[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> QuantizedTensor:
    packed, shape = _part(parts, "weight_packed"), _part(parts, "weight_shape")
    if shape.is_floating_point() or shape.shape != (2,):
        raise Misfit("weight_shape", f"is {shape.dtype} {list(shape.shape)}; right is two whole numbers")
    out, width = (int(size) for size in shape.tolist())
    bits = scheme.bits
    wanted = [out, -(-width * bits // 32)]
    if packed.dtype != torch.int32 or list(packed.shape) != wanted:
        raise Misfit("weight_packed", f"is {packed.dtype} {list(packed.shape)}; right is torch.int32 {wanted}")
    if width * bits % 8:
        raise Misfit("weight_shape", f"is of {width} inputs; rows of an odd number of 4 bit weights are not read")
    codes = packed.view(torch.uint8)[:, : width * bits // 8]
    has_zeros = not scheme.symmetric or "weight_zero_point" in parts
    zeros = _packed_zeros(_part(parts, "weight_zero_point"), out, bits) if has_zeros else None
    return _affine(codes, width, parts, zeros, bits, scheme, dtype)


def _packed_zeros(stored: Tensor, out: int, bits: int) -> Tensor:
    """Return uint8 [out, groups]; older versions, and one zero for all weights, are int8 as they are."""
    if stored.dtype == torch.int8:
        return (stored.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    if stored.dtype != torch.int32 or stored.dim() != 2 or stored.shape[0] != -(-out * bits // 32):
        raise Misfit("weight_zero_point", f"is {stored.dtype} {list(stored.shape)}, which does not hold {out} rows")
    by_group = unpack_codes(stored.T.contiguous().view(torch.uint8), bits)  # [groups, out and some more]
    return by_group[:, :out].T.contiguous()


def _flat_zeros(parts: Mapping[str, Tensor]) -> Tensor | None:
    stored = parts.get("weight_zero_point")
    return None if stored is None else (stored.to(torch.int16) + 128).to(torch.uint8)


def _affine(
    codes: Tensor,
    width: int,
    parts: Mapping[str, Tensor],
    zeros: Tensor | None,
    bits: int,
    scheme: Scheme,
    dtype: torch.dtype,
) -> AffineTensor:
    group = scheme.group_size or width
    if scheme.strategy == "block":
        raise Misfit("weight_scale", "is of blocks, which this plugin reads for floats only")
    if width % group:
        raise Misfit("weight_scale", f"is of groups of {group}, which do not divide the weight's {width} inputs")
    out, groups = codes.shape[0], width // group
    found = {"codes": codes, "scales": _rows("weight_scale", _scales(parts), out, groups)}
    if zeros is not None:
        found["zeros"] = _rows("weight_zero_point", zeros, out, groups)
    order = _order(parts.get("weight_g_idx"), width, group)
    if order is not None:
        found["codes"] = pack_codes(unpack_codes(codes, bits)[:, order], bits)
    return AffineTensor(found, width, dtype, bits=bits, group_size=group, order=order)


def _rows(name: str, stored: Tensor, out: int, groups: int) -> Tensor:
    """Spread one value, or one a row, to [out, groups]."""
    if stored.numel() == 1:
        return stored.reshape(1, 1).expand(out, groups).contiguous()
    if stored.dim() == 1 and stored.shape[0] == out:
        stored = stored[:, None]
    if list(stored.shape) != [out, groups]:
        raise Misfit(name, f"has shape {list(stored.shape)}; right is {[out, groups]}")
    return stored


def _order(g_idx: Tensor | None, width: int, group: int) -> Tensor | None:
    """Columns sorted by their group; None where they are in order already. -1 stands where nobody sorted."""
    if g_idx is None or bool((g_idx == -1).all()):
        return None
    if g_idx.shape != (width,) or not bool((torch.bincount(g_idx.long(), minlength=width // group) == group).all()):
        raise Misfit("weight_g_idx", f"does not give each of {width // group} groups {group} columns")
    order = torch.argsort(g_idx.long(), stable=True)
    return None if torch.equal(order, torch.arange(width)) else order


def _floats(values: Tensor, parts: Mapping[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> QuantizedTensor:
    scales, (out, width) = _scales(parts), values.shape
    if values.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise Misfit("weight", f"is {values.dtype}; right is a float8")
    if scheme.strategy in ("tensor", "channel"):
        return float8_tensor(values, _rows("weight_scale", scales, out, 1), None, dtype)
    block = scheme.block or (1, scheme.group_size or width)
    wanted = [-(-out // block[0]), -(-width // block[1])]
    if list(scales.shape) != wanted:
        raise Misfit("weight_scale", f"has shape {list(scales.shape)}; right is {wanted}")
    return float8_tensor(values, scales, block, dtype)
