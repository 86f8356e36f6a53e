"""Safetensors files written without numpy, which the safetensors library needs for that.

torch works without numpy, and so does svp_peft. The bytes are also always the same for the same
tensors, while the library writes metadata in random order.
"""

import ctypes
import json
import struct
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], bytes]:
    """(header entries, bytes of all tensors) of a safetensors file, widest dtypes first.

    Args:
        tensors: by key; any device and layout, and they may share memory.

    Raises:
        TypeError: a dtype that is not written here.
    """
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    entries: dict[str, Any] = {}
    pieces: list[bytes] = []
    end = 0
    for key in order:
        tensor = tensors[key].detach()
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{key} has dtype {tensor.dtype}, which is not written. Convert it to one of "
                f"{[str(dtype).removeprefix('torch.') for dtype in _DTYPES]}."
            )
        data = _bytes(tensor)
        entries[key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(data)],
        }
        end += len(data)
        pieces.append(data)
    return entries, b"".join(pieces)


def assemble(entries: Mapping[str, Any], payload: bytes, metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file from what `pack` gave."""
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + payload


def _bytes(tensor: Tensor) -> bytes:
    """Little-endian bytes of a tensor, copied."""
    tensor = tensor.cpu().contiguous()
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return b""
    data = ctypes.string_at(tensor.data_ptr(), size)
    if sys.byteorder == "big":
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, tensor.element_size())
        data = bytes(raw.flip(1).reshape(-1).tolist())
    return data
