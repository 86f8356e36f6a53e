"""Which implementation of the ops runs: the only place that chooses.

    reference   plain PyTorch, any device and dtype, float64 too; slow
    cpu         C++ compiled at first use; float32 on a CPU
    cuda        CUDA C++ compiled at run time by NVRTC; float32, bfloat16, float16
    triton      Triton; the same dtypes
    mamba_ssm   stock mamba-ssm and causal-conv1d; the same dtypes

"auto" takes the fastest that works: cuda, then triton on an NVIDIA GPU, cpu on a CPU, else the
reference. Naming a backend never falls back: it runs, or `BackendError` says why it cannot.
"""

import importlib
import logging
from types import ModuleType

import torch

from svp_peft.errors import BackendError, InputError
from svp_peft.ops import reference

BACKENDS = ("reference", "cpu", "cuda", "triton", "mamba_ssm")

_CANDIDATES = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_DTYPES = {
    "cpu": (torch.float32,),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "mamba_ssm": (torch.float32, torch.bfloat16, torch.float16),
}

_default = "auto"
_reported: set[tuple[str, str]] = set()
_log = logging.getLogger(__name__)


def set_backend(name: str) -> None:
    """Set the backend of this process for every call that does not name one.

    Args:
        name: "auto" (the default), "reference", "cpu", "cuda", "triton" or "mamba_ssm".

    Raises:
        InputError: no backend has this name. Whether it can run is checked when it is used, since
            that depends on the device of the tensors.
    """
    global _default
    _default = _known(name)


def get_backend() -> str:
    """The process default set by `set_backend`; "auto" unless changed."""
    return _default


def choose(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs on tensors of this device and compute dtype.

    Raises:
        InputError: `backend` is no backend's name.
        BackendError: the backend was named, here or by `set_backend`, and cannot run.
    """
    return _decide(_known(_default if backend is None else backend), device, dtype)


def _decide(name: str, device: torch.device, dtype: torch.dtype) -> str:
    if name == "reference":
        return name
    if name != "auto":
        reason = _reason_against(name, device, dtype)
        if reason is not None:
            raise BackendError(
                f"backend={name!r} cannot run here: {reason} "
                f"Use backend='auto' to take whatever works."
            )
        return name
    for candidate in _CANDIDATES.get(device.type, ()):
        if dtype not in _DTYPES[candidate]:
            continue
        reason = kernels(candidate).unavailable(device)
        if reason is None:
            return candidate
        if (candidate, reason) not in _reported:
            _reported.add((candidate, reason))
            _log.info("backend %s is not used: %s", candidate, reason)
    return "reference"


# finding the answer imports and builds backends, which cannot be traced: a compiler calls the
# function and takes its answer as a constant. This is what torch.compiler.assume_constant_result
# sets; calling that would import the compiler, and triton with it
_decide._dynamo_marked_constant = True  # type: ignore[attr-defined]


def provides(name: str, function: str) -> bool:
    """Whether a backend has a kernel of its own for `function`."""
    return hasattr(kernels(name), function)


provides._dynamo_marked_constant = True  # type: ignore[attr-defined]


def kernels(name: str) -> ModuleType:
    """The package of one backend; it is imported when first asked for."""
    module = _loaded.get(name)
    if module is None:
        module = _loaded[name] = importlib.import_module(f"svp_peft.ops.{name}")
    return module


_loaded: dict[str, ModuleType] = {"reference": reference}


def _known(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise InputError(
            f"backend={name!r} does not exist. Choose one of {['auto', *BACKENDS]}; "
            f"'auto' takes the fastest that works."
        )
    return name


def _reason_against(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in _DTYPES[name]:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES[name])
        return (
            f"it computes in {allowed} and the tensors are {str(dtype).removeprefix('torch.')}; "
            f"backend='reference' takes every dtype."
        )
    return kernels(name).unavailable(device)
