"""How tensors are laid out in memory, as the kernels see it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from svp_peft.ops.cuda.kernels import CPP_TYPE


def rows(x: Tensor) -> tuple[Tensor, int]:
    """A (batch, L, width) tensor whose batch * L rows are equally spaced, and their distance.

    Slices of a wider row qualify as they are; anything else is copied.
    """
    batch, length, width = x.shape
    batch_stride, row, last = x.stride()
    if last == 1 or width == 1:
        if length == 1:
            return x, batch_stride if batch > 1 else width
        if batch == 1 or batch_stride == length * row:
            return x, row
    return x.contiguous(), width


def parameter(x: Tensor) -> Tensor:
    """A parameter as the kernels read it: contiguous, in float32, bfloat16 or float16."""
    if x.dtype not in CPP_TYPE:
        x = x.float()
    return x if x.is_contiguous() else x.contiguous()


def parameters(x: Sequence[Tensor] | None) -> tuple[Tensor, ...] | None:
    """`parameter` for each direction; all get the first one's dtype."""
    if x is None:
        return None
    first = parameter(x[0])
    return (first, *(parameter(other.to(first.dtype)) for other in x[1:]))


def cpp_type(x: Sequence[Tensor] | None) -> str:
    """C++ type of a parameter; any will do for one that is absent."""
    return "float" if x is None else CPP_TYPE[x[0].dtype]


def copy_bytes(*addresses_and_sizes: int) -> int:
    """Bytes that one asynchronous copy may move: 16, 8 or 4; 0 where alignment allows none."""
    bits = 16
    for value in addresses_and_sizes:
        bits |= value
    lowest = bits & -bits
    return lowest if lowest >= 4 else 0


def pack_of(width: int, most: int, *addresses: int) -> int:
    """Elements of one access: the largest power of two up to `most` that fits them all."""
    size = most
    while size > 1 and (width % size or any(a % size for a in addresses)):
        size //= 2
    return size


def pointers(x: Sequence[Tensor] | None) -> tuple[int, int]:
    """Addresses per direction; 0 for an absent one."""
    if x is None:
        return 0, 0
    return x[0].data_ptr(), x[1].data_ptr() if len(x) > 1 else 0


def device_index(x: Tensor) -> int:
    """Number of the GPU that holds x."""
    return x.device.index if x.device.index is not None else torch.cuda.current_device()


def element_size(dtype: torch.dtype) -> int:
    """Bytes of one activation."""
    return 4 if dtype == torch.float32 else 2
