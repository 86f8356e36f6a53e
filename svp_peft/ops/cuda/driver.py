"""The few calls of the CUDA driver that loading and launching a kernel take.

They act in the primary context of a device, the one that PyTorch works in.
"""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator

from svp_peft.errors import BackendError

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_INVALID_CONTEXT = 201


class Driver:
    """libcuda, loaded with PyDLL: giving up Python's lock for calls of 2 us would not pay."""

    def __init__(self) -> None:
        self._lib = ctypes.PyDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        self._launch = self._lib.cuLaunchKernel
        self._launch.argtypes = [
            ctypes.c_void_p,
            *[ctypes.c_uint] * 7,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        self._check(self._lib.cuInit(0), "cuInit")
        version = ctypes.c_int()
        self._check(self._lib.cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
        self.version = version.value

    @functools.cache  # noqa: B019 (one Driver lives as long as the process)
    def _primary_context(self, index: int) -> ctypes.c_void_p:
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._check(self._lib.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
        retained = self._lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        self._check(retained, "cuDevicePrimaryCtxRetain")
        return context

    @contextlib.contextmanager
    def _context(self, index: int) -> Iterator[None]:
        self._check(self._lib.cuCtxPushCurrent_v2(self._primary_context(index)), "cuCtxPushCurrent")
        try:
            yield
        finally:
            self._lib.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def load(self, image: bytes, entry: str, index: int, dynamic_shared: int) -> int:
        """Load a cubin or PTX on a device; returns the handle of the kernel `entry`.

        Raises:
            BackendError: the driver refuses the code, or the GPU lacks the shared memory.
        """
        with self._context(index):
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._check(self._lib.cuModuleLoadData(ctypes.byref(module), image), f"loading {entry}")
            found = self._lib.cuModuleGetFunction(ctypes.byref(function), module, entry.encode())
            self._check(found, f"finding {entry}")
            if dynamic_shared > 48 * 1024:
                self._check(
                    self._lib.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, dynamic_shared),
                    f"giving {entry} {dynamic_shared} bytes of shared memory",
                )
            assert function.value is not None
            return function.value

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        stream: int,
        arguments: ctypes.Array,
        index: int,
    ) -> None:
        """Launch on `stream`; `arguments` is the array of pointers to the kernel's parameters.

        Raises:
            BackendError: the launch was refused.
        """
        call = (function, *grid, threads, 1, 1, shared, stream, arguments, None)
        status = self._launch(*call)
        if status == _INVALID_CONTEXT:  # a thread that has not touched the GPU yet
            self._check(
                self._lib.cuCtxSetCurrent(self._primary_context(index)), "setting the context"
            )
            status = self._launch(*call)
        if status:
            self._check(status, "launching a kernel")

    def _check(self, status: int, what: str) -> None:
        if status != 0:
            text = ctypes.c_char_p()
            self._lib.cuGetErrorString(status, ctypes.byref(text))
            reason = (text.value or b"unknown error").decode()
            raise BackendError(f"The CUDA driver failed in {what}: {reason} (code {status}).")


@functools.lru_cache(maxsize=1)
def find_driver() -> Driver | str:
    """The driver, or a sentence that says why there is none."""
    try:
        return Driver()
    except (OSError, BackendError) as error:
        return f"the NVIDIA driver cannot be used ({error}); install or update it."
