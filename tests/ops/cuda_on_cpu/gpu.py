"""An emulated GPU in the place of the first one, for CPU tensors and as long as a test runs."""

import contextlib
import importlib
import pkgutil
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from svp_peft.ops import cuda
from svp_peft.ops.cuda import disk_cache, kernels
from tests.ops.cuda_on_cpu.emulator import Driver, Nvrtc

_MODULES = [
    importlib.import_module(f"{cuda.__name__}.{module.name}")
    for module in pkgutil.iter_modules(cuda.__path__)
]


class EmulatedGpu:
    """An H100 as the launchers see it; `launches` are the entries called so far."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._multiprocessors = 132

    @property
    def multiprocessors(self) -> int:
        """Few of them make a small batch fill the GPU; set before the first launch."""
        return self._multiprocessors

    @multiprocessors.setter
    def multiprocessors(self, count: int) -> None:
        self._multiprocessors = count
        kernels.multiprocessors.cache_clear()

    @property
    def order(self) -> str:
        """In which order blocks, warps and lanes run: one of `emulator.ORDERS`."""
        return self._driver.order

    @order.setter
    def order(self, name: str) -> None:
        self._driver.order = name

    @property
    def launches(self) -> list[str]:
        return self._driver.launches

    def forget_kernels(self) -> None:
        """Have every kernel built and loaded again when it is needed next."""
        for module in _MODULES:
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@contextlib.contextmanager
def emulated_gpu(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[EmulatedGpu]:
    """Let the functions of `svp_peft.ops.cuda` take CPU tensors.

    Args:
        cache: where built kernels are kept.
    """
    driver, nvrtc = Driver(cache), Nvrtc()
    gpu = EmulatedGpu(driver)

    def properties(_: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            multi_processor_count=gpu.multiprocessors, shared_memory_per_block_optin=227 * 1024
        )

    address = torch.Tensor.data_ptr

    def data_ptr(tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        driver.tensors.pop(storage.data_ptr(), None)
        driver.tensors[storage.data_ptr()] = storage.nbytes()
        return address(tensor)

    patch.setattr(torch.Tensor, "data_ptr", data_ptr)
    patch.setattr(kernels, "find_nvrtc", lambda: nvrtc)
    patch.setattr(kernels, "find_driver", lambda: driver)
    patch.setattr(cuda, "unavailable", lambda _: None)
    patch.setattr(importlib.import_module("svp_peft.ops.cuda.wide"), "WIDE_PRODUCTS", False)
    patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    patch.setattr(torch.cuda, "get_device_properties", properties)
    patch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    # translated sources are no business of the user's cache
    patch.setattr(disk_cache, "read", lambda _: None)
    patch.setattr(disk_cache, "write", lambda *_: None)
    gpu.forget_kernels()
    yield gpu
    gpu.forget_kernels()
