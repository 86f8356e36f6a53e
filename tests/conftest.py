"""What every test shares: seeds, one thread per worker, and the GPU mark."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svp_peft import VisionMamba


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


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a Vim with four blocks of width 32 for images of 32x32, for the examples."""
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = VisionMamba(
        **{"img_size": 32, "patch_size": 8, "stride": 8, "embed_dim": 32, "depth": 4},
        num_classes=7,
        rms_norm=True,
        fused_add_norm=True,
        residual_in_fp32=True,
        bimamba_type="v2",
        if_cls_token=True,
        use_middle_cls_token=True,
        if_abs_pos_embed=True,
        if_divide_out=True,
    )
    torch.random.set_rng_state(generator)
    path = tmp_path_factory.mktemp("backbone") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return path
