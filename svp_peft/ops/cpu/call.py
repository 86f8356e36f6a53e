"""Hands tensors to the C++ kernels: one struct of 8-byte fields per call.

Every kernel takes a pointer to a struct of csrc/*.h and the number of its fields, and refuses when
that number is not its own.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from svp_peft.errors import InputError
from svp_peft.ops.cpu.loader import loaded


class Call:
    """The fields of one struct, in the order of its declaration, and the tensors behind them."""

    def __init__(self) -> None:
        self._fields: list[int] = []
        self._kept: list[Tensor] = []

    def numbers(self, *values: int) -> None:
        """Fields of type int64_t."""
        self._fields += values

    def rows(self, tensor: Tensor | None) -> None:
        """A field of type Rows: (batch, L, columns), copied unless its columns lie side by side.

        A tensor that the kernel writes to must have them so: it would write to the copy.
        """
        if tensor is None:
            self._fields += (0, 0, 0)
            return
        if tensor.dtype != torch.float32:
            raise InputError(
                f"the C++ kernels compute in float32 and got {tensor.dtype}. Convert the tensor, "
                f"or use backend='reference', which takes every dtype."
            )
        if tensor.stride(2) != 1 and tensor.shape[2] != 1:
            tensor = tensor.contiguous()
        self._kept.append(tensor)
        self._fields += (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))

    def parameters(self, *tensors: Tensor | None) -> None:
        """Pointer fields: parameters of any float dtype, read as contiguous float32."""
        for tensor in tensors:
            if tensor is None:
                self._fields.append(0)
                continue
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                tensor = tensor.detach().to(torch.float32).contiguous()
            self._kept.append(tensor)
            self._fields.append(tensor.data_ptr())

    def run(self, name: str, factor: float = 1.0) -> None:
        """Call the kernel; it returns when its work is done. `factor` is its one float argument."""
        count = len(self._fields)
        struct = (ctypes.c_int64 * count)(*self._fields)
        refused = getattr(loaded(), name)(struct, ctypes.c_int64(count), ctypes.c_double(factor))
        if refused == 1:
            raise RuntimeError(f"{name} does not take {count} fields")
        if refused:
            raise MemoryError(f"{name} could not allocate its working memory")


def at(group: Sequence[Tensor] | None, index: int) -> Tensor | None:
    """The direction's tensor, or None where the whole group is absent."""
    return None if group is None else group[index]
