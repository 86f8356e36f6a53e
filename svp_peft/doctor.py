"""What `svp-peft doctor` finds: what is installed, which backend would run, and every remedy.

Packages are looked at without trusting them: versions come from their metadata, signatures from
their source, and only then are they imported, inside a guard.
"""

import ast
import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from svp_peft.ops.backends import BACKENDS, choose, kernels

Status = Literal["ok", "absent", "problem"]

# arguments of Mamba.__init__ by which the forks are told apart
_FORKS = {
    "if_divide_out": "hustvl/Vim's fork",
    "if_devide_out": "the older copy of hustvl/Vim's fork that the released SVP code ships",
    "bimamba_type": "a fork in the manner of hustvl/Vim's",
    "nslices": "SegMamba's fork",
    "bimamba": "VideoMamba's fork",
}
_ARITY = {4: "1.0", 5: "1.1", 7: "1.2 to 1.5.0", 8: "1.5.1 or newer"}
"""Arguments of causal_conv1d_fwd by release of causal-conv1d."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: Status
    """ok; absent: not there, and only needed for what `detail` says; problem: see `remedy`."""
    detail: str
    remedy: str = ""


def diagnose() -> list[Finding]:
    """Everything there is to say about this installation. Builds the CPU kernels if need be."""
    return [
        *_system(),
        *_dependencies(),
        _compiler(),
        _package("triton", "the backend 'triton'"),
        *_mamba_ssm(),
        *_causal_conv1d(),
        *_backends(),
    ]


def _system() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    yield Finding("torch", "ok", f"{torch.__version__}, built with {build}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            memory = f"{found.total_memory / 2**30:.0f} GiB"
            capability = f"compute capability {found.major}.{found.minor}"
            yield Finding(f"gpu {index}", "ok", f"{found.name}, {memory}, {capability}")
    elif shutil.which("nvidia-smi") and not torch.version.cuda:
        yield Finding(
            "gpu",
            "problem",
            "there is an NVIDIA driver, but torch is built without CUDA",
            "Install a CUDA build of torch: https://pytorch.org/get-started/locally",
        )
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "gpu",
            "problem",
            f"there is an NVIDIA driver, but torch (CUDA {torch.version.cuda}) finds no GPU",
            "Run nvidia-smi: update the driver if it is older than torch's CUDA, and check "
            "CUDA_VISIBLE_DEVICES.",
        )
    else:
        yield Finding("gpu", "absent", "no NVIDIA GPU; everything runs on the CPU")


def _dependencies() -> Iterator[Finding]:
    for name in ("svp_peft", "safetensors", "huggingface_hub", "packaging"):
        version = _version(name)
        if version is None:
            yield Finding(name, "problem", "not installed", f"pip install {name}")
        else:
            yield Finding(name, "ok", version)
    for name, use in (("timm", "the training examples"), ("peft", "comparisons with LoRA")):
        yield _package(name, use)


def _package(name: str, use: str) -> Finding:
    version = _version(name)
    if importlib.util.find_spec(name) is None:
        return Finding(name, "absent", f"not installed; needed for {use} only")
    return Finding(name, "ok", version or "installed")


def _compiler() -> Finding:
    names = filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++", "cl"])
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        return Finding("c++ compiler", "absent", "none found; needed for the backend 'cpu' only")
    return Finding("c++ compiler", "ok", found)


def _mamba_ssm() -> Iterator[Finding]:
    root = _folder("mamba_ssm")
    if root is None:
        yield Finding(
            "mamba-ssm", "absent", "not installed; the backends 'cuda', 'triton' and 'cpu' do "
            "without it",
        )  # fmt: skip
        return
    arguments = init_arguments(root / "modules" / "mamba_simple.py", "Mamba")
    fork = next((label for name, label in _FORKS.items() if name in arguments), None)
    interface = root / "ops" / "selective_scan_interface.py"
    inner = "mamba_inner_fn_no_out_proj" in _source(interface)
    what = f"{fork}, in {root}" if fork else f"the stock package, in {root}"
    version = _version("mamba_ssm") or "version unknown"
    detail = f"{version}: {what}; mamba_inner_fn_no_out_proj: {'yes' if inner else 'no'}"
    error = _import_error("mamba_ssm")
    if error:
        yield Finding(
            "mamba-ssm",
            "problem",
            f"{detail}. It cannot be imported: {error}",
            "Build it for this torch: pip install --no-build-isolation --force-reinstall "
            "--no-deps mamba-ssm. Or uninstall it: svp_peft does not need it.",
        )
        return
    yield Finding("mamba-ssm", "ok", detail)
    if getattr(sys.modules.get("mamba_ssm.modules.mamba_simple"), "RMSNorm", True) is None:
        yield Finding(
            "mamba-ssm RMSNorm",
            "problem",
            "RMSNorm is None: mamba_ssm could not import its Triton norm, and models built with "
            "its Block fail with 'NoneType is not callable'",
            "Install a Triton that fits torch, and mamba-ssm 2 with Block code of its own age "
            "(layernorm was renamed to layer_norm). svp_peft.VisionMamba needs neither.",
        )
    wanted = call_arity(interface, "causal_conv1d_fwd")
    found = conv_arity()
    if wanted and found and wanted != found:
        yield Finding(
            "mamba-ssm and causal-conv1d",
            "problem",
            f"mamba_ssm calls causal_conv1d_fwd with {wanted} arguments and the installed "
            f"causal-conv1d takes {found}: the first forward pass of a fork's model fails",
            f"Install causal-conv1d {_ARITY.get(wanted, 'of the age of mamba_ssm')}, or use "
            "svp_peft.VisionMamba (VisionMamba.from_model adopts a model's weights).",
        )


def _causal_conv1d() -> Iterator[Finding]:
    if _folder("causal_conv1d") is None:
        yield Finding(
            "causal-conv1d", "absent", "not installed; needed for the backend 'mamba_ssm' only"
        )
        return
    version = _version("causal_conv1d") or "version unknown"
    error = _import_error("causal_conv1d")
    if error:
        yield Finding(
            "causal-conv1d",
            "problem",
            f"{version} cannot be imported: {error}",
            "Build it for this torch: pip install --no-build-isolation --force-reinstall "
            "--no-deps causal-conv1d. Or uninstall it: svp_peft does not need it.",
        )
        return
    arity = conv_arity()
    takes = f"causal_conv1d_fwd takes {arity} arguments" if arity else "arguments unknown"
    age = f", as in {_ARITY[arity]}" if arity in _ARITY else ""
    yield Finding("causal-conv1d", "ok", f"{version}; {takes}{age}")


def _backends() -> Iterator[Finding]:
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.insert(0, torch.device("cuda", torch.cuda.current_device()))
    for device in devices:
        chosen = choose("auto", device, torch.float32)
        # a backend that would be faster than the one that runs is missed, on the main device
        missed = device is devices[0]
        for name in BACKENDS:
            if name == "reference" or (name == "cpu") != (device.type == "cpu"):
                continue
            missed &= name != chosen
            reason = _unavailable(name, device)
            label = f"backend {name}"
            if reason is None:
                yield Finding(label, "ok", f"runs on {device.type}")
            elif missed and name != "mamba_ssm":
                yield Finding(label, "problem", f"does not run on {device.type}", reason)
            else:
                yield Finding(label, "absent", reason)
        yield Finding(f"auto on {device.type}", "ok", f"{chosen!r} runs for float32 tensors")


def _unavailable(name: str, device: torch.device) -> str | None:
    try:
        reason: str | None = kernels(name).unavailable(device)
    except Exception as error:  # a broken package must not end the examination
        return f"{type(error).__name__}: {error}"
    return reason


def conv_arity() -> int | None:
    """Number of arguments of the compiled causal_conv1d_fwd, if it is installed and says so."""
    if _import_error("causal_conv1d_cuda"):
        return None
    function: Any = getattr(sys.modules["causal_conv1d_cuda"], "causal_conv1d_fwd", None)
    names = re.findall(r"arg\d+:", getattr(function, "__doc__", None) or "")
    return len(names) or None


def call_arity(source: Path, function: str) -> int | None:
    """Number of arguments with which the code in `source` calls `function`."""
    for node in ast.walk(_parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name == function and not any(isinstance(a, ast.Starred) for a in node.args):
                return len(node.args) + len(node.keywords)
    return None


def init_arguments(source: Path, name: str) -> list[str]:
    """Argument names of `__init__` of the class `name` in `source`."""
    for node in ast.walk(_parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    return [argument.arg for argument in (*item.args.args, *item.args.kwonlyargs)]
    return []


def _source(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(_source(path))
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _import_error(name: str) -> str:
    """Why `name` cannot be imported; "" if it can."""
    try:
        importlib.import_module(name)
    except Exception as error:  # extension modules raise anything
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
