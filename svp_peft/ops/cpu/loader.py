"""The compiled kernels: found in the cache, or built there at first use.

The library is named after everything it depends on (sources, flags, compiler, torch, instruction
set), so a cached one is never stale. It is built in a directory of its own and moved into place in
one step, so no process ever sees half of it; a file lock, which dies with its owner, only keeps
processes that start together from doing the same work twice.

    SVP_PEFT_CACHE   where builds are kept; else $XDG_CACHE_HOME/svp_peft, else ~/.cache/svp_peft
    SVP_PEFT_CPU=0   turns the C++ kernels off
    CXX              the compiler, as for every PyTorch extension; else c++
"""

import ctypes
import errno
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("csrc")
_PATIENCE = 600.0  # seconds for one build; twenty times what a slow laptop needs
_FALLBACK = "Until then the reference runs, many times slower; SVP_PEFT_CPU=0 silences this."
_COMPILER_HINT = "Install one (Debian, Ubuntu: apt install g++; macOS: xcode-select --install)"

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_reason: str | None = None


class CannotBuild(Exception):
    """Why there are no C++ kernels, and what to install, in one or two sentences."""


def loaded() -> ctypes.CDLL:
    """The library of the kernels. Call it only where `reason()` is None."""
    if reason() is not None or _library is None:
        raise RuntimeError(f"the C++ kernels are not loaded: {_reason}")
    return _library


def reason() -> str | None:
    """None once the kernels are loaded, else why they cannot be; decided once per process.

    The first call may compile (a few seconds) and, where that fails, warns once.
    """
    global _library, _reason
    if _library is not None or _reason is not None:
        return _reason
    with _lock:
        if _library is None and _reason is None:
            if os.environ.get("SVP_PEFT_CPU") == "0":
                _reason = "SVP_PEFT_CPU=0 turns the C++ kernels off; unset it."
                return _reason
            try:
                _library = _load()
            except CannotBuild as error:
                _reason = str(error)
                warnings.warn(
                    f"svp_peft runs without its C++ kernels: {error} {_FALLBACK}",
                    RuntimeWarning,
                    stacklevel=2,
                )
    return _reason


def cache_directories() -> Iterator[Path]:
    """Where builds are looked for and kept, in order of preference; created as they are reached."""
    named = os.environ.get("SVP_PEFT_CACHE")
    xdg = os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(named) if named else (Path(xdg) if xdg else Path.home() / ".cache") / "svp_peft"
        # the build runs in another working directory
        yield root.expanduser().absolute() / "cpu"
    except RuntimeError:  # no home directory
        pass
    # anyone may write to the temporary directory, and what is loaded from there runs as this user
    try:
        shared = Path(tempfile.gettempdir()) / f"svp_peft-{os.getuid()}"
        shared.mkdir(mode=0o700, exist_ok=True)
        found = shared.lstat()
        private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
        if private and found.st_uid == os.getuid():
            yield shared / "cpu"
    except OSError:
        pass


def target_flags() -> list[str]:
    """Compiler flags for the instruction set that PyTorch itself uses on this machine."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        return ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"]
    if capability == "AVX2":
        return ["-mavx2", "-mfma"]
    return []


def _load() -> ctypes.CDLL:
    if sys.platform == "win32":
        raise CannotBuild("they are built on Linux and macOS only; use WSL.")
    compiler = _compiler()
    # contraction: a multiply and an add become one instruction with one rounding
    flags = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", *target_flags()]
    sources = sorted(SOURCES.glob("*.cpp"))
    found = compiler.stat()
    known = [
        *(f"{path.name}\n{path.read_text()}" for path in sorted(SOURCES.iterdir())),
        *flags,
        f"{compiler} {found.st_size} {found.st_mtime_ns} {os.environ.get('CXX', '')}",
        f"{torch.__version__} {sys.implementation.cache_tag} {sys.platform} {platform.machine()}",
    ]
    key = hashlib.sha256("\0".join(known).encode()).hexdigest()[:16]
    refused: list[str] = []
    for directory in cache_directories():
        built = directory / f"svp_cpu-{key}.so"
        try:
            if built.is_file():
                return ctypes.CDLL(str(built))
        except OSError as error:  # a damaged file, built again below; or nothing is reached there
            _log.info("%s does not load (%s) and is built again", built, error)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _build_once(built, sources, flags, compiler)
            return ctypes.CDLL(str(built))
        except OSError as error:  # read-only, full, mounted noexec, another user's
            refused.append(f"{directory} cannot be used ({error.strerror or error})")
            _log.info("%s", refused[-1])
    raise CannotBuild(
        f"no directory to build them in: {'; '.join(refused)}. Set SVP_PEFT_CACHE to one you can "
        f"write to and load libraries from."
    )


def _compiler() -> Path:
    """The compiler's file, or the wrapper's; `CXX` may name either, with arguments."""
    command = os.environ.get("CXX", "c++")
    try:
        words = shlex.split(command)
    except ValueError:  # an unfinished quotation
        words = []
    path = shutil.which(words[0]) if words else None
    if path is None:
        raise CannotBuild(f"there is no C++ compiler {command!r}. {_COMPILER_HINT} or set CXX.")
    return Path(path).resolve()


def _build_once(built: Path, sources: list[Path], flags: list[str], compiler: Path) -> None:
    """Build the library, unless another process does while this one waits.

    Raises:
        CannotBuild: what is missing or broken is the same in every directory.
        OSError: this directory will not do; another may.
    """
    damaged = built.stat() if built.exists() else None
    with _exclusive(built.with_suffix(".lock")):
        if built.exists() and (damaged is None or built.stat().st_ino != damaged.st_ino):
            return
        _remove_abandoned(built.parent)
        with tempfile.TemporaryDirectory(prefix="build-", dir=built.parent) as scratch:
            started = time.perf_counter()
            _build(scratch, sources, flags, compiler)
            os.replace(Path(scratch) / "svp_cpu.so", built)
            elapsed = time.perf_counter() - started
        if elapsed > 2:
            _log.info("compiled the C++ kernels in %.1f s, once: %s", elapsed, built)


def _build(scratch: str, sources: list[Path], flags: list[str], compiler: Path) -> None:
    include = Path(torch.__file__).parent / "include"
    if not (include / "ATen" / "Parallel.h").is_file():
        raise CannotBuild(
            f"this torch has no C++ headers in {include}. Install torch from its wheel (pip) or "
            f"its full conda package."
        )
    # scripts of the running environment count even where it was not activated
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    if shutil.which("ninja", path=path) is None:
        raise CannotBuild("the build tool ninja is missing. Install it: pip install ninja")
    request = {
        "directory": scratch,
        "sources": [str(source) for source in sources],
        "flags": flags,
    }
    # as text: run as a file, it would see this package's modules as top-level ones
    script = Path(__file__).with_name("build.py").read_text()
    command = [sys.executable, "-c", script, json.dumps(request)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | {"PATH": path, "LC_ALL": "C"},
            cwd=scratch,
            timeout=_PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"the build did not run: {error}") from error
    linked = (Path(scratch) / "svp_cpu.so").is_file()
    if done.returncode == 0 and linked:
        return
    _log.debug("building the C++ kernels failed:\n%s", done.stdout)
    if linked:
        raise OSError(f"what is built there does not load: {_first_error(done.stdout, '.so: ')}")
    if os.strerror(errno.ENOSPC) in done.stdout:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise CannotBuild(
        f"{compiler} does not compile them: {_first_error(done.stdout, 'error:')}. "
        f"Install a working C++ compiler (Debian, Ubuntu: apt install g++; macOS: "
        f"xcode-select --install) or set CXX to one."
    )


def _first_error(output: str, sign: str) -> str:
    """The first line with `sign` in it, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if sign in line] or lines[-1:] or ["no output"]
    return errors[0][:300].rstrip(".")


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold the file's lock; it is the kernel's, so it ends with its owner, however that ends."""
    import fcntl

    with open(path, "a") as file:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks: building twice is harmless
                break
        yield


def _remove_abandoned(directory: Path) -> None:
    """Delete what builds of more than a day ago left behind when they were killed."""
    for left in directory.glob("build-*"):
        try:
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            continue
