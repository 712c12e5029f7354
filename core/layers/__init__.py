"""Building blocks of native models; plugins import them from here."""

from core.layers.attention import Attention
from core.layers.embedding import Embedding, Head
from core.layers.linear import Linear, MergedLinear, pack_linears, unpack_linears
from core.layers.mlp import GatedMLP
from core.layers.norm import RMSNorm
from core.layers.rotary import Rotary, RotaryError, apply_rotary

__all__ = [
    "Attention",
    "Embedding",
    "GatedMLP",
    "Head",
    "Linear",
    "MergedLinear",
    "RMSNorm",
    "Rotary",
    "RotaryError",
    "apply_rotary",
    "pack_linears",
    "unpack_linears",
]
