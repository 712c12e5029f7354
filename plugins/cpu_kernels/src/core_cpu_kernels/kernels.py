"""CpuKernels: which weights have a kernel, and the function that multiplies with one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core.errors import CoreError
from core.layers import AffineTensor, QuantizedTensor, TableTensor
from core_cpu_kernels.elementwise import ACTIVATIONS, GateKernel, NormKernel, RotaryKernel
from core_cpu_kernels.library import Library, Weight, wanted_instruction_set

if TYPE_CHECKING:
    from core.kernel_contracts import DecoderKernel, HeadParts, LayerParts, LinearKernel

PACKINGS = {"affine4": 1, "affine8": 2, "table4": 3, torch.float16: 4, torch.bfloat16: 5, torch.float32: 6}
GGML = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
GGML_PACKINGS = dict(zip(GGML, (102, 103, 106, 107, 108, 110, 111, 112, 113, 114, 120, 123), strict=True))
GGML_PACKINGS |= {"F16": PACKINGS[torch.float16], "BF16": PACKINGS[torch.bfloat16]}  # halves are just halves
TYPES = {torch.uint8: 1, torch.float16: 2, torch.bfloat16: 3, torch.float32: 4}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class CpuKernels:
    """A `core.kernel_contracts.Kernels` for CPUs."""

    def __init__(self, instruction_set: str | None = None) -> None:
        """`instruction_set`: one of INSTRUCTION_SETS; None: what the environment says, else the best there is."""
        self.library = Library(wanted_instruction_set() if instruction_set is None else instruction_set)
        self.name = f"cpu_kernels ({self.library.instruction_set})"
        self.takes_float32 = self.library.instruction_set != "plain"  # whose vectors of four oneDNN's own code beats

    def linear(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        if weight.dim() != 2 or weight.device.type != "cpu" or 0 in weight.shape:
            return None
        described = _describe(weight)
        if described is None:
            return None
        spec, kept = described
        if bias is not None:
            kept["bias"] = bias.detach().float().contiguous()
            spec.bias = kept["bias"].data_ptr()
        made = self.library.make(spec)
        if made is None:
            return None
        return KernelFunction(self.library, made, spec, kept)

    def highest(self, linear: LinearKernel) -> LinearKernel | None:
        from core_cpu_kernels.screen import make_screen

        ours = isinstance(linear, KernelFunction) and linear.library is self.library
        return make_screen(self.library, linear) if ours else None

    def experts(self, weights: Tensor, bias: Tensor | None) -> None:
        """Experts are multiplied with one after the other, each by `linear`."""

    def rms_norm(self, weight: Tensor, eps: float, dtype: torch.dtype = torch.float32) -> NormKernel | None:
        return NormKernel(self.library, weight, eps) if _is_plain(weight) and dtype is torch.float32 else None

    def gate(self, activation: str, dtype: torch.dtype = torch.float32) -> GateKernel | None:
        kind = ACTIVATIONS.get(activation) if dtype is torch.float32 else None
        return None if kind is None else GateKernel(self.library, kind)

    def rotary(self, dtype: torch.dtype = torch.float32, interleaved: bool = False) -> RotaryKernel | None:
        return None if interleaved or dtype is not torch.float32 else RotaryKernel(self.library)

    def decoder(self, layers: Sequence[LayerParts], head: HeadParts | None = None) -> DecoderKernel | None:
        from core_cpu_kernels.stack import make_stack

        return make_stack(self.library, layers, head)


def _is_plain(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.is_contiguous()


class KernelFunction:
    """x [..., in] -> [..., out]; computes in float32 and answers in x's dtype."""

    def __init__(self, library: Library, made: int, spec: Weight, kept: dict[str, Tensor]) -> None:
        self.library, self.made = library, made
        self._linear, self._free = library.linear, library.free
        self.in_features, self.out_features = int(spec.in_), int(spec.out)
        self._kept = kept  # what the library points at
        self._spec = spec

    @property
    def has_floats(self) -> bool:
        """True if the weight is plain floats, of four bytes or two."""
        return self._spec.packing in [PACKINGS[dtype] for dtype in FLOATS]

    def __call__(self, x: Tensor) -> Tensor:
        """Raises CoreError for an x of another width, or one that holds no floats."""
        if x.dtype is not torch.float32:
            return self._in_float32(x)
        if x.requires_grad or not x.is_contiguous():
            x = x.detach().contiguous()
        *leading, width = x.shape
        if width != self.in_features or x.device.type != "cpu":
            raise CoreError(
                f"This linear takes [..., {self.in_features}] on the CPU, not {list(x.shape)} on {x.device}."
            )
        out = x.new_empty((*leading, self.out_features))
        rows = x.numel() // width
        if rows and self._linear(self.made, x.data_ptr(), out.data_ptr(), rows):
            raise MemoryError(f"no memory for the activations {list(x.shape)}")
        return out

    def _in_float32(self, x: Tensor) -> Tensor:
        if x.dtype not in FLOATS:
            raise CoreError(f"This linear takes float32, float16 or bfloat16, not {x.dtype}.")
        return self(x.float()).to(x.dtype)

    def __deepcopy__(self, memo: Any) -> KernelFunction:
        return self  # the weight that it reads is never written to

    def __del__(self) -> None:
        self._free(self.made)


def _describe(weight: Tensor) -> tuple[Weight, dict[str, Tensor]] | None:
    """Return the C description of a weight, and the tensors that it points into; None for what has no kernel."""
    if type(weight) in (Tensor, torch.nn.Parameter) and weight.dtype in PACKINGS:
        return _plain(weight.detach())
    if isinstance(weight, AffineTensor | TableTensor) and weight.packing in PACKINGS:
        return _grouped(weight)
    if isinstance(weight, QuantizedTensor) and weight.packing.startswith("ggml:"):
        return _blocks(weight)
    return None


def _blocks(weight: QuantizedTensor) -> tuple[Weight, dict[str, Tensor]] | None:
    """GGML's blocks as a GGUF file has them: one part, uint8 [out, bytes of a row]."""
    packing, blocks = GGML_PACKINGS.get(weight.packing.removeprefix("ggml:")), weight.parts.get("blocks")
    if packing is None or blocks is None or blocks.dtype != torch.uint8 or not blocks.is_contiguous():
        return None
    return _spec(weight, packing, blocks, blocks.shape[-1]), {"blocks": blocks}


def _plain(weight: Tensor) -> tuple[Weight, dict[str, Tensor]] | None:
    if not weight.is_contiguous():
        return None
    return _spec(weight, PACKINGS[weight.dtype], weight, weight.element_size() * weight.shape[1]), {"codes": weight}


def _grouped(weight: QuantizedTensor) -> tuple[Weight, dict[str, Tensor]] | None:
    parts = dict(weight.parts)
    extra = parts.get("zeros", parts.get("offsets"))
    used = [part for part in (parts["codes"], parts["scales"], extra) if part is not None]
    if not all(part.is_contiguous() and part.dtype in TYPES for part in used):
        return None
    codes, scales = parts["codes"], parts["scales"]
    spec = _spec(weight, PACKINGS[weight.packing], codes, codes.shape[-1])
    spec.group, spec.scales, spec.scale_type = weight.settings["group_size"], scales.data_ptr(), TYPES[scales.dtype]
    if extra is not None:
        spec.extra, spec.extra_type = extra.data_ptr(), TYPES[extra.dtype]
    if weight.settings.get("order") is not None:
        parts["order"] = weight.settings["order"].to(torch.int64).contiguous()
        spec.order = parts["order"].data_ptr()
    if "table" in weight.settings:
        parts["table"] = torch.tensor(weight.settings["table"], dtype=torch.float32)
        spec.table = parts["table"].data_ptr()
    return spec, parts


def _spec(weight: Tensor, packing: int, codes: Tensor, row_bytes: int) -> Weight:
    out, in_ = weight.shape
    spec = Weight(out=out, in_=in_, row_bytes=row_bytes, codes=codes.data_ptr(), packing=packing)
    return spec
