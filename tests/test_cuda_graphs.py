"""A training step and an inference call as CUDA graphs (examples/cuda_graphs.py)."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import svp_peft as sp
from svp_peft.vim import VisionMamba

pytestmark = pytest.mark.gpu


def _recipe() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "cuda_graphs.py"
    spec = importlib.util.spec_from_file_location("cuda_graphs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _model() -> VisionMamba:
    torch.manual_seed(0)
    model = VisionMamba(
        img_size=64, embed_dim=64, depth=4, num_classes=5, drop_path_rate=0.0
    ).cuda()
    sp.apply_svp(model, sp.SVPConfig(cross_group_size=2, inner_bottleneck=16))
    with torch.no_grad():
        model.svp.alpha.normal_(std=0.3)
        model.svp.beta.normal_(std=0.3)
    return model


def _losses(graphed: bool, dtype: torch.dtype) -> list[float]:
    model = _model().train()
    images = torch.randn(4, 3, 64, 64, device="cuda")
    labels = torch.arange(4, device="cuda")
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, capturable=True)
    losses = []

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        enabled = dtype != torch.float32
        with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    run = _recipe().capture(step, warmup=3) if graphed else step
    for index in range(11):
        if graphed and index < 3:  # the warm-up has made these steps; the capture itself makes none
            losses.append(float("nan"))
            continue
        if index == 6:  # new data between two replays
            images.copy_(torch.linspace(-1, 1, images.numel(), device="cuda").view_as(images))
        losses.append(run().item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graphed_training_step_follows_the_eager_one(dtype: torch.dtype) -> None:
    eager, graphed = _losses(False, dtype)[3:], _losses(True, dtype)[3:]
    # the same kernels in the same order; AdamW's first steps magnify any difference
    assert graphed == pytest.approx(eager, rel=1e-3)
    assert eager[2] < eager[0]


def test_a_graphed_inference_call_sees_new_images_and_new_adapter_weights() -> None:
    model = _model().eval()
    images = torch.randn(2, 3, 64, 64, device="cuda")

    def infer() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return model(images)

    run = _recipe().capture(infer)
    for change in (lambda: images.normal_(), lambda: model.svp.alpha.data.mul_(2)):
        change()
        replayed = run().clone()
        assert torch.equal(replayed, infer())
