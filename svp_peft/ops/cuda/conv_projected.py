"""The short convolution's input gradient together with the product that comes before it.

What a mixer's backward pass knows of the gradient of u, the convolution's output, is the scan's
part and d x_dbl; the rest is d x_dbl @ x_proj. As a product of its own that reads and writes a
tensor of the size of u which the convolution's backward pass then reads again. This kernel computes
the product where it is needed.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from svp_peft.ops.cuda.kernels import CPP_TYPE, Kernel, multiprocessors
from svp_peft.ops.cuda.layout import cpp_type

_TILE = 16  # tokens
_STAGES = 2  # tiles in shared memory, the one in use among them
_WARPS = 4  # of a block, 32 channels each, where that divides the channels
_RESIDENT = 12  # warps of a multiprocessor, which leaves each thread 168 registers: none spill
_LAYOUT = "Q2Q2Q4Q2i"


def supports(width: int, row: int, channels: int) -> bool:
    """Whether the kernel takes `width` taps and x_dbl rows of `row` elements (16-bit ones)."""
    return width <= 4 and row % 8 == 0 and 0 < row <= 96 and channels % 32 == 0


def projected_launch(
    device: int,
    dtype: torch.dtype,
    batch: int,
    length: int,
    row: int,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    reverse: Sequence[bool],
) -> tuple[Kernel, tuple[int, int, int], int]:
    """The kernel, its grid and the tokens that a block walks along.

    Args:
        row: elements of a row of x_dbl.
        weight: per direction, (d_inner, width).
    """
    channels, width = weight[0].shape
    warps = next(w for w in range(_WARPS, 0, -1) if channels % (32 * w) == 0)
    blocks = _RESIDENT // warps
    kernel = _kernel(
        device, CPP_TYPE[dtype], cpp_type(weight), cpp_type(bias), width, tuple(reverse),
        bias is not None, channels, row, warps, blocks,
    )  # fmt: skip
    columns = channels // (32 * warps)
    chunk = _chunk(length, 2 * (width - 1), columns * batch, blocks * multiprocessors(device))
    return kernel, (columns, -(-length // chunk), batch), chunk


def _chunk(length: int, seam: int, units: int, at_once: int) -> int:
    """Tokens of a block: whole tiles less the seam that two neighbours both compute.

    Chosen by the time of all blocks, `at_once` of them running, if beginning takes as long as a
    tile.
    """

    def time(tiles: int) -> int:
        blocks = units * -(-length // (tiles * _TILE - seam))
        return -(-blocks // at_once) * (tiles + 1)

    most = -(-(length + seam) // _TILE)
    return min(range(1, most + 1), key=time) * _TILE - seam


@functools.cache
def _kernel(
    device: int,
    act: str,
    weight_type: str,
    bias_type: str,
    taps: int,
    reverse: tuple[bool, ...],
    has_bias: bool,
    channels: int,
    row: int,
    warps: int,
    blocks: int,
) -> Kernel:
    directions = len(reverse)
    tile = _TILE * 32 * warps * 2  # bytes
    stage = directions * (tile + _TILE * -(-row // 32) * 64) + tile
    shared = _STAGES * stage + warps * _TILE * 36 * directions * 4
    macros = {
        "ACT": act,
        "W_T": weight_type,
        "BIAS_T": bias_type,
        "TAPS": taps,
        "DIRECTIONS": directions,
        "REVERSED": reverse[0],
        "HAS_BIAS": has_bias,
        "D_INNER": channels,
        "ROW": row,
        "WARPS": warps,
        "STAGES": _STAGES,
        "BLOCKS_PER_SM": blocks,
        "SHARED_BYTES": shared,
    }
    name = "conv_backward_projected"
    return Kernel(name, name, macros, _LAYOUT, device, threads=32 * warps, shared=shared)
