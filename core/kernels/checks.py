"""What wrappers check before a kernel touches memory; messages name the argument, its value and what would be right."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from core.errors import KernelError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTS = (torch.int32, torch.int64)


def check(
    kernel: str,
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    dtypes: Collection[torch.dtype],
    like: Tensor,
    dense: bool = False,
) -> None:
    """Check rank and sizes (None = any), dtype, device, and that rows lie in memory without gaps between elements.

    `dense` asks for no gaps at all. Raises KernelError.
    """
    if tensor.dim() != len(shape) or any(w is not None and w != h for w, h in zip(shape, tensor.shape, strict=False)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise KernelError(f"{kernel}: {name} must have shape [{wanted}], got {list(tensor.shape)}.")
    if tensor.dtype not in dtypes:
        names = " or ".join(_short(dtype) for dtype in dtypes)
        raise KernelError(f"{kernel}: {name} must be {names}, got {_short(tensor.dtype)}.")
    if tensor.device != like.device:
        raise KernelError(f"{kernel}: {name} is on {tensor.device}, but the other tensors are on {like.device}.")
    if dense and not tensor.is_contiguous():
        raise KernelError(f"{kernel}: {name} must be contiguous, got strides {list(tensor.stride())}.")
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise KernelError(
            f"{kernel}: {name} must have its last dimension contiguous (stride 1), got strides {list(tensor.stride())}."
        )


def require(kernel: str, holds: bool, message: str) -> None:
    """Raise KernelError with `message` unless `holds`."""
    if not holds:
        raise KernelError(f"{kernel}: {message}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pow2(size: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least `size` and `least`."""
    return max(least, 1 << max(0, size - 1).bit_length())


def split_width(width: int, least: int = 16) -> tuple[int, int]:
    """Cut a width into two powers of two that cover it: 576 -> (512, 64), 192 -> (128, 64), 80 -> (64, 16).

    The second is 0 where one is enough; padding both to one power of two would waste up to half the work.
    """
    whole = pow2(width, least)
    main = whole // 2
    if whole == width or main < least:
        return whole, 0
    rest = pow2(width - main, least)
    return (whole, 0) if main + rest >= whole else (main, rest)
