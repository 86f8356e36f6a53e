"""The short convolution with its SiLU on the GPU, both directions in one kernel."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from svp_peft.errors import InputError
from svp_peft.ops.cuda.kernels import CPP_TYPE, Kernel, multiprocessors
from svp_peft.ops.cuda.layout import (
    cpp_type,
    device_index,
    element_size,
    pack_of,
    parameters,
    pointers,
    rows,
)

_LAYOUT = "Q2Q2Q2Q2QQQ5i4x"


def conv_silu(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    reverse: Sequence[bool],
) -> tuple[Tensor, ...]:
    """See `svp_peft.ops.reference.conv_silu`; (batch, L, d_inner) per direction."""
    x, x_row = rows(x)
    batch, length, channels = x.shape
    taps, biases = parameters(weight), parameters(bias)
    out = tuple(x.new_empty(batch, length, channels) for _ in reverse)
    if x.numel() == 0:
        return out
    kernel, pack = _kernel_for("conv_forward", x, x_row, taps, biases, reverse, (), x_row)
    chunk, grid = _grid(kernel.device, batch, length, channels, pack, 8)
    kernel(
        grid,
        x.data_ptr(), *pointers(taps), *pointers(biases), *pointers(out), 0, 0, 0, 0,
        length, channels, x_row, 0, chunk,
    )  # fmt: skip
    return out


def conv_silu_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    reverse: Sequence[bool],
    *,
    dx_out: Tensor | None = None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
    """Gradients of `conv_silu`: dx in x's dtype, those of weight and bias in float32.

    Args:
        grads: per direction, (batch, L, d_inner).
        dx_out: (batch, L, d_inner) view to write dx into.
    """
    need_bias = need_bias and bias is not None
    x, x_row = rows(x)
    batch, length, channels = x.shape
    grads = [g.contiguous() for g in grads]
    taps, biases = parameters(weight), parameters(bias)
    dx, dx_row = None, 0
    if need_x:
        dx = dx_out if dx_out is not None else x.new_empty(batch, length, channels)
        written, dx_row = rows(dx)
        if written.data_ptr() != dx.data_ptr():
            raise ValueError(
                f"dx_out with strides {tuple(dx.stride())} cannot be written: its rows must be "
                f"equally spaced and its last dimension contiguous."
            )
    partial = None
    if x.numel():
        needs = (need_x, need_weight, need_bias)
        kernel, pack = _kernel_for(
            "conv_backward", x, x_row, taps, biases, reverse, needs, dx_row or x_row,
            *(g.data_ptr() for g in grads), 0 if dx is None else dx.data_ptr(),
        )  # fmt: skip
        chunk, grid = _grid(kernel.device, batch, length, channels, pack, 5)
        if need_weight or need_bias:
            width = weight[0].shape[1]
            partial = torch.empty(
                (batch * grid[1], len(reverse), width + 1, channels),
                device=x.device,
                dtype=torch.float32,
            )
        kernel(
            grid,
            x.data_ptr(), *pointers(taps), *pointers(biases), 0, 0, *pointers(grads),
            0 if dx is None else dx.data_ptr(), 0 if partial is None else partial.data_ptr(),
            length, channels, x_row, dx_row, chunk,
        )  # fmt: skip
    if partial is None:
        if not (need_weight or need_bias):
            return dx, None, None
        sums = torch.zeros(len(reverse), weight[0].shape[1] + 1, channels, device=x.device)
    else:
        sums = partial.sum(0)
    dweight = tuple(s[:-1].t().contiguous() for s in sums) if need_weight else None
    dbias = tuple(s[-1] for s in sums) if need_bias else None
    return dx, dweight, dbias


def _kernel_for(
    entry: str,
    x: Tensor,
    x_row: int,
    weight: tuple[Tensor, ...] | None,
    bias: tuple[Tensor, ...] | None,
    reverse: Sequence[bool],
    needs: tuple[bool, ...],
    other_row: int,
    *addresses: int,
) -> tuple[Kernel, int]:
    assert weight is not None
    size = element_size(x.dtype)
    unit = [a // size if a % size == 0 else 1 for a in (x.data_ptr(), *addresses)]
    pack = pack_of(x.shape[2], 2, x_row, other_row, *unit)
    index = device_index(x)
    kernel = _kernel(
        entry, index, CPP_TYPE[x.dtype], cpp_type(weight), cpp_type(bias), weight[0].shape[1],
        pack, tuple(reverse), bias is not None, needs or (True, False, False),
    )  # fmt: skip
    return kernel, pack


@functools.cache
def _kernel(
    entry: str,
    device: int,
    act: str,
    weight_type: str,
    bias_type: str,
    taps: int,
    pack: int,
    reverse: tuple[bool, ...],
    has_bias: bool,
    needs: tuple[bool, bool, bool],
) -> Kernel:
    if len(reverse) == 2 and reverse[0] == reverse[1]:
        raise InputError(
            f"reverse={reverse}: the CUDA convolution joins two directions only when they are "
            f"opposite. Call it once per direction."
        )
    macros = {
        "ACT": act,
        "W_T": weight_type,
        "BIAS_T": bias_type,
        "TAPS": taps,
        "PACK": pack,
        "DIRECTIONS": len(reverse),
        "REVERSED": reverse[0],
        "HAS_BIAS": has_bias,
        "NEED_X": needs[0],
        "NEED_WEIGHT": needs[1],
        "NEED_BIAS": needs[2],
    }
    return Kernel("conv", entry, macros, _LAYOUT, device, threads=128)


def _grid(
    device: int, batch: int, length: int, channels: int, pack: int, blocks: int
) -> tuple[int, tuple[int, int, int]]:
    """Tokens of a thread, and the grid: no more blocks than run at once, or the rest runs alone."""
    columns = -(-channels // (128 * pack))
    wanted = blocks * multiprocessors(device) // (columns * batch)
    chunk = max(8, -(-length // max(1, wanted)))
    return chunk, (columns, -(-length // chunk), batch)
