"""NVIDIA's run-time compiler, from the library that comes with PyTorch: CUDA C++ to machine code.

No toolkit, no host compiler. The library is looked for in the nvidia wheels beside torch, in
torch's own folder, and where the system keeps a CUDA toolkit, in this order.
"""

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from svp_peft.errors import BackendError


class Nvrtc:
    """One loaded libnvrtc."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lib = ctypes.CDLL(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = (major.value, minor.value)

    def target(self, capability: tuple[int, int]) -> str:
        """The --gpu-architecture for a GPU: its own machine code, or PTX where it is too new.

        Raises:
            BackendError: this NVRTC knows no architecture as old as the GPU's.
        """
        count = ctypes.c_int()
        self._check(self._lib.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        known = (ctypes.c_int * count.value)()
        self._check(self._lib.nvrtcGetSupportedArchs(known))
        wanted = capability[0] * 10 + capability[1]
        older = [arch for arch in known if arch <= wanted]
        if not older:
            raise BackendError(
                f"NVRTC {self.version[0]}.{self.version[1]} ({self.path}) compiles for compute "
                f"capability {min(known) / 10} and newer, and the GPU has {wanted / 10}. "
                f"Install a torch build for this GPU, or use backend='triton'."
            )
        nearest = max(older)
        # machine code runs on later minor versions of the same major one; otherwise the driver
        # finishes the job from PTX
        return f"{'sm' if nearest // 10 == capability[0] else 'compute'}_{nearest}"

    def compile(
        self, source: str, name: str, headers: dict[str, str], options: tuple[str, ...]
    ) -> bytes:
        """CUDA C++ to a cubin (or PTX for a compute_ target).

        Raises:
            BackendError: the compiler refused the source; the message holds its log.
        """
        lib = self._lib
        program = ctypes.c_void_p()
        encoded = {key.encode(): text.encode() for key, text in headers.items()}
        self._check(
            lib.nvrtcCreateProgram(
                ctypes.byref(program),
                source.encode(),
                name.encode(),
                len(encoded),
                (ctypes.c_char_p * len(encoded))(*encoded.values()),
                (ctypes.c_char_p * len(encoded))(*encoded),
            )
        )
        try:
            arguments = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
            status = lib.nvrtcCompileProgram(program, len(options), arguments)
            if status != 0:
                log = self._fetch(program, "nvrtcGetProgramLog").rstrip(b"\0").decode()
                raise BackendError(
                    f"NVRTC {self.version[0]}.{self.version[1]} could not compile {name}:\n{log}\n"
                    f"options: {' '.join(options)}\n"
                    f"This is a bug of svp_peft; backend='triton' works without NVRTC."
                )
            to_ptx = any("=compute_" in option for option in options)
            return self._fetch(program, "nvrtcGetPTX" if to_ptx else "nvrtcGetCUBIN")
        finally:
            lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _fetch(self, program: ctypes.c_void_p, getter: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._lib, getter + "Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._lib, getter)(program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status != 0:
            describe = self._lib.nvrtcGetErrorString
            describe.restype = ctypes.c_char_p
            raise BackendError(f"NVRTC ({self.path}) failed: {describe(status).decode()}.")


@functools.lru_cache(maxsize=1)
def find_nvrtc() -> Nvrtc | str:
    """The compiler, or a sentence that says why there is none. Searched once per process."""
    failures = []
    for path in _candidates():
        try:
            return Nvrtc(path)
        except (OSError, BackendError, AttributeError) as error:
            failures.append(f"{path} ({error})")
    found = f" These could not be loaded: {'; '.join(failures)}." if failures else ""
    return (
        f"NVIDIA's run-time compiler NVRTC was not found.{found} A CUDA build of torch brings it; "
        f"so does `pip install nvidia-cuda-nvrtc-cu{(torch.version.cuda or '12').split('.')[0]}`."
    )


def _candidates() -> Iterator[str]:
    """Paths of libnvrtc, best first: the one of torch's own CUDA version before others."""
    pattern = "nvrtc64_*.dll" if sys.platform == "win32" else "libnvrtc.so*"
    roots: list[Path] = []
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        roots += sorted(p for p in Path(folder).glob("*/*") if p.name in ("lib", "bin", "lib64"))
    roots.append(Path(torch.__file__).parent / "lib")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            roots += [Path(os.environ[variable]) / name for name in ("lib64", "lib", "bin")]
    roots.append(Path("/usr/local/cuda/lib64"))
    found = [str(path) for root in roots for path in sorted(root.glob(pattern))]
    if sys.platform != "win32":
        # older wheels of torch carry it with a hash in its name
        torch_lib = Path(torch.__file__).parent / "lib"
        found += [
            str(path)
            for path in sorted(torch_lib.glob("libnvrtc-*.so*"))
            if "builtins" not in path.name
        ]
    major = (torch.version.cuda or "").split(".")[0]
    same = [p for p in found if major and (f".so.{major}" in p or f"nvrtc64_{major}" in p)]
    yield from dict.fromkeys(same + found)
    if sys.platform != "win32":
        yield "libnvrtc.so" + (f".{major}" if major else "")
