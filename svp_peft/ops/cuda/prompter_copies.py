"""Half-precision copies of the prompters' weights, laid out for the products.

The trained weights are in float32 and change at every step; their copies in the compute dtype lie
side by side in one buffer, which one launch fills.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from svp_peft.ops.cuda.kernels import CPP_TYPE, Kernel
from svp_peft.ops.cuda.layout import device_index

_AT_ONCE = 64  # blocks of one launch; their addresses have to fit into its 4 KiB of arguments
_EACH = 8  # elements of a thread

# Rows of [W | D] for products that end with the forward pass are filled up to a multiple of this,
# where that adds a seventh at most: cuBLAS is faster with whole tiles. 1 for none.
PADDED_ROWS = 128


class Packed(NamedTuple):
    """Copies in the compute dtype: [W | D], its bias, U, its bias."""

    joint: Tensor
    joint_bias: Tensor
    up: Tensor
    up_bias: Tensor
    padded: Tensor
    """`joint` and rows of zeros, see `PADDED_ROWS`."""
    padded_bias: Tensor


class Copies:
    """Copies of the weights of one or more blocks, written anew for every forward pass.

    A kernel of ours writes them, always: an optimizer may change weights behind the back of their
    version counters (in a captured graph, through `.data`), and a pass over a few hundred kilobytes
    costs less than finding out. It does not count as a change to autograd either, so that two
    forward passes may come before their backward passes.
    """

    def __init__(self, blocks: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> None:
        """
        Args:
            blocks: per block the six weights W, b, D, c, U, d; shapes are the same for all.
        """
        # not the weights themselves: those of a deleted adapter need not stay
        self.dtype, self.addresses = dtype, _addresses(blocks)
        self._shapes = _shapes(blocks[0])
        cross, _, down, _, up, _ = blocks[0]
        width, bottleneck = cross.shape[0], down.shape[0]
        rows = width + bottleneck
        padded = _padded(rows)
        # 16-byte starts
        sizes = [-(-n // 8) * 8 for n in (padded * width, padded, up.numel(), width)]
        share = sum(sizes)
        buffer = cross.new_zeros(len(blocks), share, dtype=dtype)
        self.packed = []
        for part in buffer:
            joint, joint_bias, up_copy, up_bias = part.split(sizes)
            self.packed.append(
                Packed(
                    joint[: rows * width].view(rows, width),
                    joint_bias[:rows],
                    up_copy[: up.numel()].view_as(up),
                    up_bias[:width],
                    joint[: padded * width].view(padded, width),
                    joint_bias[:padded],
                )
            )
        begins = (
            0,
            sizes[0],
            width * width,
            sizes[0] + width,
            sizes[0] + sizes[1],
            sizes[0] + sizes[1] + sizes[2],
        )
        counts = tuple(w.numel() for w in blocks[0])
        index, act, weight = device_index(cross), CPP_TYPE[dtype], CPP_TYPE[cross.dtype]
        self._launches = []
        for first in range(0, len(blocks), _AT_ONCE):
            addresses = self.addresses[6 * first : 6 * (first + _AT_ONCE)]
            number = len(addresses) // 6
            at = buffer.data_ptr() + first * share * buffer.element_size()
            self._launches.append(
                (
                    _pack_kernel(index, act, weight, number),
                    (-(-max(counts) // (256 * _EACH)), 6, number),
                    (*addresses, at, *begins, *counts, share),
                )
            )

    def is_for(self, blocks: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> bool:
        """Whether these are copies of tensors at the same places and of the same shapes.

        Tensors that took the place of others are as good: `renewed` reads what is there then.
        """
        return (
            dtype == self.dtype
            and self.addresses == _addresses(blocks)
            and self._shapes == _shapes(blocks[0])
        )

    def renewed(self) -> list[Packed]:
        """The copies per block, equal to the weights as they are now."""
        for kernel, grid, arguments in self._launches:
            kernel(grid, *arguments)
        return self.packed


def _padded(rows: int) -> int:
    padded = -(-rows // PADDED_ROWS) * PADDED_ROWS
    return padded if 7 * (padded - rows) <= rows else rows


def _addresses(blocks: Sequence[Sequence[Tensor]]) -> tuple[int, ...]:
    return tuple([w.data_ptr() for w in itertools.chain.from_iterable(blocks)])


def _shapes(block: Sequence[Tensor]) -> list[torch.Size]:
    return [w.shape for w in block]


@functools.cache
def _pack_kernel(device: int, act: str, weight: str, blocks: int) -> Kernel:
    macros = {"ACT": act, "W_T": weight, "BLOCKS": blocks, "EACH": _EACH}
    layout = f"{6 * blocks + 1}Q13i4x"
    return Kernel("pack", "pack_prompters", macros, layout, device, threads=256)
