"""CUDA C++ kernels, compiled at first use by the NVRTC library that comes with PyTorch.

float32, bfloat16 and float16 on NVIDIA GPUs of compute capability 8.0 and newer; state and sums in
float32. The files: `*.cu` kernels and `*.cuh` what they share; nvrtc.py the compiler, disk_cache.py
its results on disk, driver.py loading and launching, kernels.py the three together; scan.py,
scan_backward.py, conv.py, conv_projected.py, norm.py, prompt.py and prompt_rows.py choose kernels
and lay out arguments, by way of layout.py. frozen_mixer.py puts those of a mixer together,
joint_prompt.py those of a block's prompts, and frozen_stack.py, with stack_kernels.py,
prompter_copies.py and prompter_gradients.py, those of many blocks. docs/kernels.md has the rest.
"""

import torch

from svp_peft.ops.cuda.conv import conv_silu, conv_silu_backward
from svp_peft.ops.cuda.frozen_mixer import frozen_mixer
from svp_peft.ops.cuda.frozen_stack import frozen_stack
from svp_peft.ops.cuda.joint_prompt import joint_prompt
from svp_peft.ops.cuda.kernels import unavailable_reason
from svp_peft.ops.cuda.norm import add_norm, add_norm_backward
from svp_peft.ops.cuda.prompt import prompt, prompt_backward
from svp_peft.ops.cuda.prompt_rows import prompt_rows
from svp_peft.ops.cuda.scan import scan
from svp_peft.ops.cuda.scan_backward import scan_backward

__all__ = [
    "add_norm",
    "add_norm_backward",
    "conv_silu",
    "conv_silu_backward",
    "frozen_mixer",
    "frozen_stack",
    "joint_prompt",
    "prompt",
    "prompt_backward",
    "prompt_rows",
    "scan",
    "scan_backward",
    "unavailable",
]


def unavailable(device: torch.device) -> str | None:
    """None where the kernels run on this device, else one sentence: what is missing."""
    if device.type != "cuda":
        return f"the kernels are for NVIDIA GPUs and the tensors are on {device}."
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs and this torch is built for AMD's."
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU, or is built without CUDA."
    index = device.index if device.index is not None else torch.cuda.current_device()
    return unavailable_reason(index)
