"""Building blocks of native models; plugins import them from here."""

from core.layers.attention import Attention
from core.layers.embedding import Embedding, Head
from core.layers.linear import Linear, MergedLinear, pack_linears, take_kernels, unpack_linears
from core.layers.mlp import GatedMLP
from core.layers.norm import RMSNorm
from core.layers.quant_formats import (
    AffineTensor,
    Float8Tensor,
    HalfTensor,
    TableTensor,
    float8_tensor,
    pack_codes,
    unpack_codes,
)
from core.layers.quantized import QuantizedLinear, QuantizedTensor, give_kernels, reads_on_device
from core.layers.rotary import Rotary, RotaryError, apply_rotary
from core.layers.screened_head import ScreenedHead, screen_of
from core.layers.stack import LayerLinears, LayerNorms, LayerStack, head_parts, kernels_of, layer_parts
from core.layers.transposed import TransposedTensor

__all__ = [
    "AffineTensor",
    "Attention",
    "Embedding",
    "Float8Tensor",
    "GatedMLP",
    "HalfTensor",
    "Head",
    "LayerLinears",
    "LayerNorms",
    "LayerStack",
    "Linear",
    "MergedLinear",
    "QuantizedLinear",
    "QuantizedTensor",
    "RMSNorm",
    "Rotary",
    "RotaryError",
    "ScreenedHead",
    "TableTensor",
    "TransposedTensor",
    "apply_rotary",
    "float8_tensor",
    "give_kernels",
    "head_parts",
    "kernels_of",
    "layer_parts",
    "pack_codes",
    "pack_linears",
    "reads_on_device",
    "screen_of",
    "take_kernels",
    "unpack_codes",
    "unpack_linears",
]
