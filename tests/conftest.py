"""What every test shares: seeds, one thread per worker, and the GPU mark."""

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # two workers with a thread each are faster than two workers that fight for two cores
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    missing = pytest.mark.skip(reason="needs an NVIDIA GPU and torch.cuda finds none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(missing)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
