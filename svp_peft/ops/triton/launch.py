"""What every launcher needs: the device, row strides that a kernel can use, dt_proj."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from svp_peft.ops.casting import cast


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def row_stride(x: Tensor) -> int | None:
    """The distance of two tokens of x (batch, L, width), or None where it is not one number.

    Element (b, t, i) then lies at (b * L + t) * row_stride + i.
    """
    batch, length, width = x.shape
    across, along, within = x.stride()
    if within != 1 and width > 1:
        return None
    if length > 1:
        return along if batch == 1 or across == length * along else None
    return across if batch > 1 else width


def with_rows(x: Tensor) -> tuple[Tensor, int]:
    """x, copied if it must be, and its row stride."""
    stride = row_stride(x)
    if stride is None:
        x = x.contiguous()
        stride = x.shape[2]
    return x, stride


def with_equal_rows(tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], int]:
    """Tensors of one shape, copied if they must be, and the row stride that they share."""
    strides = {row_stride(x) for x in tensors}
    (stride,) = strides if len(strides) == 1 else (None,)
    if stride is not None:
        return tuple(tensors), stride
    return tuple(x.contiguous() for x in tensors), tensors[0].shape[2]


def pair(tensors: Sequence[Tensor] | None, missing: Tensor) -> tuple[Tensor, Tensor]:
    """Two pointers for a kernel: a single direction twice, `missing` where there is nothing."""
    if tensors is None:
        return missing, missing
    return tensors[0], tensors[-1]


def step_sizes(dt: Sequence[Tensor], dt_weight: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """dt per channel, (batch, L, d_inner) contiguous: dt_proj applied where it is given."""
    if dt_weight is None:
        return tuple(x.contiguous() for x in dt)
    full = []
    for low, weight in zip(dt, dt_weight, strict=True):
        flat = low.reshape(-1, low.shape[2])
        product = torch.mm(flat, cast(weight, low.dtype).detach().T)
        full.append(product.view(*low.shape[:2], weight.shape[0]))
    return tuple(full)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def packed(parameters: Sequence[Tensor] | None) -> list[Tensor] | None:
    """Contiguous parameters; a tied or sliced one may not be."""
    return None if parameters is None else [x.detach().contiguous() for x in parameters]
