"""Linear layers, and what makes them fast once their weights are there: kernels, or a better layout.

A linear whose weight a plugin's kernels can read as it is calls the kernel: quantized, or floats of two bytes; of four
where the kernels say that they are the faster way. For the others: plain F.linear wastes up to four times the time at 2
to 64 rows, where serving lives. oneDNN with a weight that is reordered once is near the memory bound there and no
slower elsewhere, so float32 weights on a CPU are packed after loading, each in the place of the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import CheckpointError
from core.layers.huge_pages import LEAST, HugePages
from core.layers.quant_formats import HalfTensor, as_halves
from core.layers.quantized import QuantizedLinear, QuantizedTensor
from core.memory import trim

if TYPE_CHECKING:
    from core.kernel_contracts import Kernels

Loader = Callable[[Tensor], None]
ROWS_HINT = 32  # rows that oneDNN chooses the layout for; the same layout serves all batch sizes


def copy_checked(name: str, target: Tensor) -> Loader:
    """Return a loader that copies a tensor of the right shape into `target`, and refuses another by name."""

    def load(tensor: Tensor) -> None:
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"Tensor {name} has shape {list(tensor.shape)}, but this model's config asks for {list(target.shape)}."
            )
        if target.is_floating_point() and not tensor.is_floating_point():
            raise CheckpointError(f"Tensor {name} is {tensor.dtype}; whole numbers without a scale are no weights.")
        with torch.no_grad():
            target.copy_(tensor)

    return load


def fill_weight(name: str, layer: nn.Module) -> Loader:
    """Return a loader of `layer.weight`: floats are copied into it, a quantized tensor takes its place."""

    def load(tensor: Tensor) -> None:
        target = layer.weight
        assert isinstance(target, Tensor)
        if isinstance(tensor, QuantizedTensor) and tensor.shape == target.shape:
            layer.weight = nn.Parameter(tensor.as_dtype(target.dtype), requires_grad=False)
        else:
            layer.weight = on_device(target, tensor.device)
            copy_checked(name, layer.weight)(tensor)

    return load


def on_device(weight: Tensor, device: torch.device) -> nn.Parameter:
    """Return a weight that was made without memory (on "meta") as an empty one on a device; any other as it is.

    Not by torch.empty_like: for a tensor without memory that imports sympy.
    """
    if not weight.is_meta:
        made = weight
    else:
        made = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=device)
    return made if isinstance(made, nn.Parameter) else nn.Parameter(made, requires_grad=False)


class Linear(nn.Module):
    """y = x @ weight.T + bias; x [..., in], weight [out, in]."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    def loaders(self, name: str) -> dict[str, Loader]:
        """Return what fills this layer, by the checkpoint's tensor name."""
        found = {f"{name}.weight": fill_weight(f"{name}.weight", self)}
        if self.bias is not None:
            found[f"{name}.bias"] = copy_checked(f"{name}.bias", self.bias)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class MergedLinear(Linear):
    """Several linears over one input as one: their outputs stand side by side.

    Quantized weights whose rows do not fit into one tensor stay linears of their own, in `parts`.
    """

    def __init__(self, in_features: int, sizes: Sequence[int], bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, sum(sizes), bias, dtype)
        self.sizes = list(sizes)
        self.parts: nn.ModuleList | None = None
        self._waiting: dict[int, Tensor] = {}  # weights that came while others of this layer have not

    def merged_loaders(self, names: Sequence[str]) -> dict[str, Loader]:
        """Return what fills each part; names stand in the order of the sizes."""
        found: dict[str, Loader] = {}
        start = 0
        for index, (name, size) in enumerate(zip(names, self.sizes, strict=True)):
            found[f"{name}.weight"] = self._part_loader(f"{name}.weight", index, start, size)
            if self.bias is not None:
                found[f"{name}.bias"] = copy_checked(f"{name}.bias", self.bias.narrow(0, start, size))
            start += size
        return found

    def _part_loader(self, name: str, index: int, start: int, size: int) -> Loader:
        def load(tensor: Tensor) -> None:
            if not self.weight.is_meta:
                copy_checked(name, self.weight.narrow(0, start, size))(tensor)
                return
            if tensor.shape != (size, self.in_features):
                raise CheckpointError(
                    f"Tensor {name} has shape {list(tensor.shape)}, but this model's config asks for "
                    f"{[size, self.in_features]}."
                )
            self._waiting[index] = tensor.to(self.weight.dtype)
            if len(self._waiting) == len(self.sizes):
                self._merge([self._waiting.pop(part) for part in range(len(self.sizes))])

        return load

    def _merge(self, weights: Sequence[Tensor]) -> None:
        first = weights[0]
        plain = not any(isinstance(weight, QuantizedTensor) for weight in weights)
        if plain or (isinstance(first, QuantizedTensor) and all(first.joins(weight) for weight in weights[1:])):
            self.weight = nn.Parameter(torch.cat(list(weights)), requires_grad=False)
            return
        biases = [None] * len(weights) if self.bias is None else self.bias.split(self.sizes)
        self.parts = nn.ModuleList(_holding(*pair) for pair in zip(weights, biases, strict=True))
        self.weight, self.bias = None, None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        if self.parts is not None:
            return torch.cat([part(x) for part in self.parts], -1)
        return F.linear(x, self.weight, self.bias)


def _holding(weight: Tensor, bias: Tensor | None) -> Linear:
    """Return a linear of these very tensors."""
    with torch.device("meta"):
        layer = Linear(weight.shape[1], weight.shape[0], bias is not None, weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


class PackedLinear(nn.Module):
    """A linear whose weight lies in oneDNN's own order; float32 on a CPU."""

    packed: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("packed", _ops()._reorder_linear_weight(weight.detach(), ROWS_HINT), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._linear = _ops()._linear_pointwise

    @property
    def weight(self) -> Tensor:
        """A plain copy, for modules that look at the weight instead of calling the layer."""
        return self.packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        missing = rounded_rows(rows) - rows
        if missing:
            flat = F.pad(x.reshape(rows, self.in_features), (0, 0, 0, missing))
            padded: Tensor = self._linear(flat, self.packed, self.bias, "none", [], "")
            return padded[:rows].view(*x.shape[:-1], self.out_features)
        out: Tensor = self._linear(x, self.packed, self.bias, "none", [], "")
        return out

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, oneDNN order"


class KernelLinear(nn.Module):
    """A linear over a plain weight that a kernel reads as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kernel: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.weight.dtype}, kernel"


class SharedLinear(nn.Module):
    """A linear over a float weight that an embedding holds too, as it lies: a second copy would double it.

    Without a kernel it multiplies several rows from the left, which torch does up to four times faster.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, kernel: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.kernel = kernel
        self.out_features, self.in_features = weight.shape
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is not None:
            return self.kernel(x)
        rows = x.reshape(-1, self.in_features)
        if len(rows) == 1:
            return F.linear(x, self.weight, self.bias)
        out = (self.weight @ rows.T).T.reshape(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


def rounded_rows(rows: int) -> int:
    """Round up to one of eight sizes between powers of two: 16, 18, 20 ... 32, 36 ...

    oneDNN makes and keeps a program for every number of rows that it meets, a few hundred kilobytes each. Rounding
    bounds their number, and with it the time and memory they take, for at most an eighth more rows.
    """
    step = 1 << max(0, (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


def can_pack(weight: Tensor) -> bool:
    """True if oneDNN can take this weight on this machine."""
    return (
        weight.device.type == "cpu"
        and not isinstance(weight, QuantizedTensor)
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def pack(layer: nn.Module, kernels: Kernels | None = None) -> nn.Module:
    """Return the fast form of a plain linear, or the layer itself where there is none.

    A quantized weight is never turned into floats: without a kernel it is computed with by torch, some rows at a time.
    """
    weight, bias = layer.weight, layer.bias
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        return layer
    if not isinstance(weight, QuantizedTensor) and type(weight) not in (Tensor, nn.Parameter):
        return layer  # another library's kind of tensor (torchao's), which multiplies in its own way
    asked = weight.parts["values"] if isinstance(weight, HalfTensor) else weight  # kernels know halves as plain tensors
    onednn = can_pack(weight)
    ask = kernels is not None and weight.dim() == 2 and (not onednn or getattr(kernels, "takes_float32", False))
    kernel = kernels.linear(asked, bias) if kernels is not None and ask else None
    if kernel is None and onednn:
        return PackedLinear(weight, bias)
    if isinstance(weight, QuantizedTensor):
        return QuantizedLinear(weight, bias, kernel) if weight.dim() == 2 else layer
    return layer if kernel is None else KernelLinear(weight, bias, kernel)


def pack_linears(
    model: nn.Module,
    kinds: tuple[type[nn.Module], ...] = (Linear, MergedLinear),
    only: Collection[nn.Module] | None = None,
    kernels: Kernels | None = None,
    let_go: Callable[[], None] = trim,
) -> int:
    """Pack every linear of exactly these kinds (and in `only`) in a module tree, one at a time; return how many.

    `kernels` are the device's (`BuildContext.kernels`), asked first; `let_go` is called for what weights took before
    they were moved (`HugePages`). Linears whose weight is shared with another module
    are packed too: the other keeps the plain tensor, and a weight that a kernel reads stays the one they share.
    Subclasses are left alone, since they may compute something else.
    """
    packed: dict[int, nn.Module] = {}
    shared = _embedded(model, kinds, kernels)
    pages = HugePages(let_go)
    # The list must not hold the linears themselves: each one's plain weight is to go before the next is packed.
    for parent in [part for part in model.modules() if type(part) not in kinds]:
        for name, child in list(parent.named_children()):
            if type(child) not in kinds or (only is not None and child not in only):
                continue
            if id(child) not in packed:
                if kernels is not None:
                    if id(child.weight) not in shared and getattr(kernels, "takes_float32", False):
                        _halve(child)
                    _place(child, kernels, pages)
                packed[id(child)] = _shared(child, kernels) if id(child.weight) in shared else pack(child, kernels)
            if packed[id(child)] is not child:
                setattr(parent, name, packed[id(child)])
    return sum(isinstance(layer, _PACKED) for layer in packed.values())


def _halve(layer: nn.Module) -> None:
    """Keep a float32 weight in two bytes where these are the very same numbers: half of it is read for every token."""
    weight = layer.weight
    if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter) or not can_pack(weight):
        return
    if weight.dim() != 2 or weight.nbytes < LEAST:
        return
    halves = as_halves(weight.detach())
    if halves is not None:
        kept = HalfTensor({"values": halves}, weight.shape[-1], weight.dtype)
        layer.weight = nn.Parameter(kept, requires_grad=False)


def _place(layer: nn.Module, kernels: Kernels, pages: HugePages) -> None:
    """Move a weight, or the parts of it, that kernels will read where they are."""
    weight = layer.weight
    if isinstance(weight, Tensor) and (not can_pack(weight) or getattr(kernels, "takes_float32", False)):
        pages.place(weight)


_PACKED = (PackedLinear, KernelLinear, QuantizedLinear, SharedLinear)


@runtime_checkable
class TakesKernels(Protocol):
    """A layer that computes with a device's kernels once it is given them."""

    def take_kernels(self, kernels: Kernels) -> None: ...


def take_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Let the layers of this package that are no linears compute with a device's kernels; call it after loading."""
    for part in model.modules():
        if isinstance(part, TakesKernels):
            part.take_kernels(kernels)


def _embedded(model: nn.Module, kinds: tuple[type[nn.Module], ...], kernels: Kernels | None) -> set[int]:
    """Ids of the float weights that linears share with others and that are multiplied with as they lie.

    That is as fast as the packed copy where there is a kernel, and takes its place in a model that is quantized to be
    small.
    """
    held = [(part, weight) for part in model.modules() for weight in part._parameters.values() if weight is not None]
    if kernels is None and not any(isinstance(weight, QuantizedTensor) for _, weight in held):
        return set()
    return {id(w) for part, w in held if type(part) not in kinds and not isinstance(w, QuantizedTensor) and can_pack(w)}


def _shared(layer: nn.Module, kernels: Kernels | None) -> nn.Module:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    return SharedLinear(weight, bias, None if kernels is None else kernels.linear(weight.detach(), bias))


def unpack_linears(model: nn.Module) -> None:
    """Put plain torch linears in the place of packed ones, with the very same weights, quantized or not."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _PACKED):
                plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None, device="meta")
                weight = child.weight
                plain.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
                plain.register_parameter("bias", child.bias)
                setattr(parent, name, plain)


def _ops() -> Any:
    return torch.ops.mkldnn
