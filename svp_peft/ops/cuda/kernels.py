"""From a .cu file of this folder to a launch: specialise, compile or fetch, load, call."""

import ctypes
import functools
import importlib.resources
import logging
import struct
import threading
import time
from collections.abc import Mapping

import torch

from svp_peft.errors import BackendError
from svp_peft.ops.cuda import disk_cache
from svp_peft.ops.cuda.driver import Driver, find_driver
from svp_peft.ops.cuda.nvrtc import Nvrtc, find_nvrtc

_log = logging.getLogger(__name__)
_HEADERS = ("common.cuh", "conv.cuh", "norm.cuh", "prompt_norm.cuh", "scan.cuh")
_PATIENCE = 2.0  # seconds of compiling after which a line says so

_OnePointer = ctypes.c_char_p * 1

CPP_TYPE = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}


def sources() -> tuple[str, ...]:
    """Names of the .cu files, without the suffix."""
    folder = importlib.resources.files(__package__)
    return tuple(sorted(f.name[:-3] for f in folder.iterdir() if f.name.endswith(".cu")))


@functools.cache
def _text(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text("utf-8")


def options_of(macros: Mapping[str, object], target: str) -> tuple[str, ...]:
    """Compiler options for a target such as "sm_90"; a bool macro becomes 0 or 1."""
    defines = (
        f"-D{name}={int(value) if isinstance(value, bool) else value}"
        for name, value in macros.items()
    )
    return ("--std=c++17", "-default-device", f"--gpu-architecture={target}", *defines)


def build(
    nvrtc: Nvrtc,
    source: str,
    macros: Mapping[str, object],
    layout: str,
    target: str,
    driver_version: int,
) -> bytes:
    """Machine code of one specialised source, from disk or from the compiler.

    Raises:
        BackendError: it does not compile, which includes that `layout` has another size than the
            kernel's struct of arguments.
    """
    options = options_of({**macros, "ARGS_BYTES": struct.calcsize(layout)}, target)
    headers = {name: _text(name) for name in _HEADERS}
    text = _text(source + ".cu")
    compiler = f"nvrtc {nvrtc.version[0]}.{nvrtc.version[1]} driver {driver_version}"
    key = disk_cache.key_of(compiler, *options, text, *headers.values())
    image = disk_cache.read(key)
    if image is None:
        with _progress(source, target):
            image = nvrtc.compile(text, source + ".cu", headers, options)
        disk_cache.write(key, image)
    return image


class _progress:
    """Adds up the time spent compiling and says once what is going on when it gets long."""

    spent = 0.0
    told = False

    def __init__(self, source: str, target: str) -> None:
        self._what = f"{source} for {target}"

    def __enter__(self) -> None:
        self._begin = time.monotonic()

    def __exit__(self, *_: object) -> None:
        seconds = time.monotonic() - self._begin
        _progress.spent += seconds
        _log.info("compiled %s in %.1f s", self._what, seconds)
        if _progress.spent > _PATIENCE and not _progress.told:
            _progress.told = True
            _log.warning(
                "svp_peft compiles its CUDA kernels, about a second each, and keeps them in %s for "
                "the next process",
                disk_cache.cache_folder(),
            )


class Kernel:
    """A kernel loaded on one device, with its launch prepared.

    The kernel takes one struct; `layout` is its format for the struct module, in the order of the
    fields in the .cu file.
    """

    def __init__(
        self,
        source: str,
        entry: str,
        macros: Mapping[str, object],
        layout: str,
        device: int,
        *,
        threads: int,
        shared: int = 0,
    ) -> None:
        nvrtc, driver = find_nvrtc(), find_driver()
        if isinstance(nvrtc, str) or isinstance(driver, str):
            raise BackendError(f"backend 'cuda' cannot run: {unavailable_reason(device)}")
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                raise BackendError(
                    f"The CUDA kernel {entry} is needed for the first time while a CUDA graph is "
                    f"captured, and loading it is not allowed then. Run the same step once before "
                    f"the capture, with the same shapes and dtypes."
                )
        with _building:
            target = nvrtc.target(torch.cuda.get_device_capability(device))
            image = build(nvrtc, source, macros, layout, target, driver.version)
            self._function = driver.load(image, entry, device, shared)
        self._driver: Driver = driver
        self.device = device
        self._threads = threads
        self._shared = shared
        self._struct = struct.Struct(layout)

    def __call__(self, grid: tuple[int, int, int], *values: float) -> None:
        """Launch on torch's current stream of the device."""
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                self(grid, *values)
            return
        # a fresh buffer per call: backward passes launch from a thread of their own
        arguments = _OnePointer(self._struct.pack(*values))
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        self._driver.launch(
            self._function, grid, self._threads, self._shared, stream, arguments, self.device
        )


_building = threading.Lock()


@functools.cache
def unavailable_reason(index: int) -> str | None:
    """None where kernels can be compiled and run on this GPU, else what is missing."""
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        name = torch.cuda.get_device_name(index)
        return (
            f"the kernels need compute capability 8.0 (Ampere) or newer and {name} has "
            f"{capability[0]}.{capability[1]}."
        )
    driver, nvrtc = find_driver(), find_nvrtc()
    if isinstance(driver, str):
        return driver
    if isinstance(nvrtc, str):
        return nvrtc
    try:
        nvrtc.target(capability)
    except BackendError as error:
        return str(error)
    return None


@functools.cache
def multiprocessors(index: int) -> int:
    """Streaming multiprocessors of a device."""
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@functools.cache
def shared_memory_limit(index: int) -> int:
    """Bytes of shared memory that one block may ask for."""
    properties = torch.cuda.get_device_properties(index)
    # the attribute came with torch 2.5; 99 KiB is the least of any GPU of capability 8.0 and newer
    return int(getattr(properties, "shared_memory_per_block_optin", 99 * 1024))
