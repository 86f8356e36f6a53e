"""Finding stock mamba-ssm and causal-conv1d: which release, whether it is a fork, whether it loads.

What can be told from files is told from files: importing mamba_ssm imports triton without a guard,
its language models and transformers. It is imported when its functions are first needed.
"""

import functools
import importlib.util
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

_OLDEST = Version("1.1")

# names that only forks under the name mamba_ssm have, by file; the forks are told apart by the
# arguments that they give to Mamba.__init__
_FORK_MARKS = {
    "modules/mamba_simple.py": ("bimamba", "nslices"),
    "ops/selective_scan_interface.py": ("mamba_inner_fn_no_out_proj", "bimamba_inner_fn"),
}

_INSTALL = (
    "It needs an NVIDIA GPU, and a wheel that fits Python, torch and CUDA (see the releases of "
    "state-spaces/mamba and Dao-AILab/causal-conv1d), or nvcc: `pip install --no-build-isolation "
    "causal-conv1d mamba-ssm`."
)


@functools.cache
def not_installed() -> str | None:
    """Why the two packages cannot be used, as far as their files tell; None where they can."""
    root = _folder("mamba_ssm")
    if root is None:
        return f"mamba-ssm is not installed. {_INSTALL}"
    mark = _fork_mark(root)
    if mark is not None:
        return (
            f"the mamba_ssm in {root} is a fork (it has `{mark}`), and what its functions compute "
            f"is not known. Install the stock release in its place, `pip install "
            f"--force-reinstall --no-deps --no-build-isolation mamba-ssm`, or use another backend: "
            f"svp_peft.VisionMamba needs no fork."
        )
    for distribution, package in (("mamba-ssm", "mamba_ssm"), ("causal-conv1d", "causal_conv1d")):
        if _folder(package) is None:
            return (
                f"{distribution} is not installed, and mamba-ssm alone has no convolution. "
                f"{_INSTALL}"
            )
        version = _version(distribution)
        if version is not None and version < _OLDEST:
            return (
                f"{distribution} {version} is older than {_OLDEST}. Upgrade it: `pip install -U "
                f"--no-build-isolation {distribution}`."
            )
    return None


@functools.cache
def not_importable() -> str | None:
    """Why the installed packages do not load; None where they do."""
    for distribution, find in (
        ("causal-conv1d", causal_conv1d_fn),
        ("mamba-ssm", selective_scan_fn),
    ):
        try:
            find()
        except Exception as error:  # a broken extension can raise anything
            return f"{distribution} does not load: {error!r}. {_remedy(distribution, error)}"
    return None


def selective_scan_fn() -> Callable[..., Any]:
    """mamba-ssm's selective scan: (u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> out."""
    module = import_module("mamba_ssm.ops.selective_scan_interface")
    return module.selective_scan_fn  # type: ignore[no-any-return]


def causal_conv1d_fn() -> Callable[..., Any]:
    """causal-conv1d's convolution, called with (x, weight, bias, activation=...).

    The number of arguments of the compiled function below it differs from release to release (4 in
    1.0, 5 in 1.1, 7 from 1.2, 8 from 1.5.1); this one takes the same in all of them.
    """
    return import_module("causal_conv1d").causal_conv1d_fn  # type: ignore[no-any-return]


def _remedy(distribution: str, error: Exception) -> str:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and missing.split(".")[0] not in (
        "causal_conv1d",
        "causal_conv1d_cuda",
        "mamba_ssm",
        "selective_scan_cuda",
    ):
        return f"Install what it imports: `pip install {missing.split('.')[0]}`."
    return (
        f"It was built for another Python, torch or CUDA: reinstall it for this one, `pip install "
        f"--force-reinstall --no-deps --no-build-isolation {distribution}`."
    )


def _fork_mark(root: Path) -> str | None:
    for name, marks in _FORK_MARKS.items():
        try:
            source = (root / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        for mark in marks:
            if mark in source:
                return mark
    return None


def _folder(package: str) -> Path | None:
    """Where a package lies, without importing it."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _version(distribution: str) -> Version | None:
    """None where it says nothing: a copied folder has no metadata."""
    try:
        return Version(metadata.version(distribution))
    except (metadata.PackageNotFoundError, InvalidVersion):
        return None
