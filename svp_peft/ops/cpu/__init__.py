"""C++ kernels for CPUs, compiled at first use: float32, any CPU, as fast as its vectors allow."""

import torch

from svp_peft.ops.cpu import loader
from svp_peft.ops.cpu.conv import conv_silu, conv_silu_backward
from svp_peft.ops.cpu.norm import add_norm, add_norm_backward
from svp_peft.ops.cpu.prompt import prompt, prompt_backward
from svp_peft.ops.cpu.scan import scan, scan_backward

__all__ = [
    "add_norm",
    "add_norm_backward",
    "conv_silu",
    "conv_silu_backward",
    "prompt",
    "prompt_backward",
    "scan",
    "scan_backward",
    "unavailable",
]


def unavailable(device: torch.device) -> str | None:
    """None where the kernels can run; else what is missing and how to get it.

    The first call on a CPU compiles the kernels unless they are in the cache.
    """
    if device.type != "cpu":
        return f"the C++ kernels run on a CPU and the tensors are on {device}."
    return loader.reason()
