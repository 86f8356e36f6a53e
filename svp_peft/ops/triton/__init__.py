"""Triton kernels: the portable path on GPUs, one file per family.

float32, bfloat16 and float16; state and sums in float32. Triton is imported when a kernel is first
asked for, never by importing this package: launch.py holds what the launchers share,
scan_kernels.py what the scan's kernels share.
"""

import functools
import importlib.util
import os
from importlib import import_module, metadata
from typing import Any

import torch
from packaging.version import Version

_HOME = {
    "scan": "scan_forward",
    "scan_backward": "scan_gradients",
    "conv_silu": "conv",
    "conv_silu_backward": "conv",
    "add_norm": "norm",
    "add_norm_backward": "norm",
    "prompt": "svp_prompt",
    "prompt_backward": "svp_prompt",
}

_OLDEST = Version("3.0")


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def unavailable(device: torch.device) -> str | None:
    """None where the kernels run on this device; else what is missing and how to get it."""
    reason = _missing()
    if reason is not None:
        return reason
    if device.type != "cuda":
        # Triton's own switch: its interpreter runs kernels on a CPU, slowly, for tests
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"Triton kernels are for GPUs and the tensors are on {device}. Move them to a GPU."
    if not torch.cuda.is_available():
        return "torch finds no GPU. Install a driver, or a torch built with CUDA."
    index = torch.cuda.current_device() if device.index is None else device.index
    return _too_old(index)


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return (
            "Triton is not installed. The CUDA wheels of torch for Linux bring it; elsewhere try "
            "`pip install triton` (on Windows `pip install triton-windows`)."
        )
    for distribution in ("triton", "pytorch-triton", "triton-windows"):
        try:
            version = Version(metadata.version(distribution))
        except metadata.PackageNotFoundError:
            continue
        if version.release < _OLDEST.release:
            return (
                f"Triton {version} is older than {_OLDEST}. Upgrade torch, which brings a newer "
                f"one: `pip install -U torch`."
            )
    return None


@functools.cache
def _too_old(index: int) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= (8, 0):
        return None
    return (
        f"{torch.cuda.get_device_name(index)} has compute capability "
        f"{capability[0]}.{capability[1]} and bfloat16 in Triton needs 8.0. "
        f"Use backend='reference'."
    )
