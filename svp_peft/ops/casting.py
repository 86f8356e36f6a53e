"""The dtype that an op computes in, and half-precision copies of frozen weights made once."""

import contextlib

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def compute_dtype(x: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on for x's device, else x's own dtype.

    float64 stays float64: PyTorch's autocast leaves it alone too.
    """
    device_type = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """For code that chooses every dtype itself: autocast on `device` off.

    A backward pass may run under another autocast than its forward pass, whose products would then
    not have the dtype that a kernel reads them as.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`; for a frozen weight the copy is made once and kept with it.

    A frozen backbone under bf16 autocast would otherwise convert every weight in every forward and
    backward pass. The copy follows the weight: it is renewed in place when the weight has been
    written to (load_state_dict), so that a captured CUDA graph keeps its addresses.
    """
    if weight.dtype == dtype:
        return weight
    # dynamo cannot trace the weak dictionary, and a compiled graph converts constants itself
    if weight.requires_grad or weight.is_inference() or torch.compiler.is_compiling():
        return weight.detach().to(dtype)
    state = (weight._version, weight.data_ptr())
    known = _copies.get(weight)
    if known is not None and known[1].dtype == dtype and known[1].device == weight.device:
        copy = known[1]
        if known[0] == state and copy.shape == weight.shape:
            return copy
        if copy.shape == weight.shape:
            copy.copy_(weight.detach())
            _copies[weight] = (state, copy)
            return copy
    # a copy made in inference mode could not be renewed outside of it
    with torch.inference_mode(False):
        copy = weight.detach().to(dtype)
    # a tensor made while a CUDA graph is captured holds nothing until the graph is replayed
    if not (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
        _copies[weight] = (state, copy)
    return copy


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
