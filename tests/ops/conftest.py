"""Fixtures of the tests of the kernels."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from svp_peft.ops.cuda import disk_cache
from tests.ops.cuda_on_cpu import emulator
from tests.ops.cuda_on_cpu.gpu import EmulatedGpu, emulated_gpu


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that an element that is never written shows."""
    with torch.device("meta"):  # which remembers the functions that make tensors, at its first use
        torch.empty(0)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def filled(*args, original=original, **kwargs):
            fresh = original(*args, **kwargs)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        monkeypatch.setattr(owner, name, filled)


@pytest.fixture(scope="session")
def emulator_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where built kernels are kept: beside those of the GPU, if that can be written to."""
    try:
        folder = disk_cache.cache_folder().with_name("cuda-on-cpu")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return tmp_path_factory.mktemp("cuda-on-cpu")


@pytest.fixture
def gpu(
    monkeypatch: pytest.MonkeyPatch, poisoned: None, emulator_cache: Path
) -> Iterator[EmulatedGpu]:
    """An emulated GPU: the CUDA kernels run on CPU tensors, and fresh memory holds NaN."""
    missing = emulator.unavailable()
    if missing is not None:
        pytest.skip(missing)
    with emulated_gpu(monkeypatch, emulator_cache) as found:
        yield found
