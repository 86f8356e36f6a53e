"""A Vim of 20,000 parameters with an adapter, for tests of files and of the Hub."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svp_peft.adapter_tensors import adapter_state
from svp_peft.config import SVPConfig
from svp_peft.patch import apply_svp
from svp_peft.vim import VisionMamba

CONFIG = SVPConfig(inner_bottleneck=4, cross_group_size=2)


def base(num_classes: int = 5, *, seed: int = 0, **kwargs: object) -> VisionMamba:
    """The same blocks for the same seed, whatever the head."""
    arguments: dict[str, object] = {
        "img_size": 16,
        "patch_size": 4,
        "stride": 4,
        "embed_dim": 16,
        "depth": 4,
        "final_pool_type": "mean",
        "if_cls_token": True,
        "use_middle_cls_token": True,
        **kwargs,
    }
    torch.manual_seed(seed)
    model = VisionMamba(num_classes=5, **arguments).eval()
    if num_classes != 5:
        # a head of another size must not change what the blocks are drawn from
        model.head = nn.Linear(16, num_classes) if num_classes else nn.Identity()
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def trained(
    config: SVPConfig = CONFIG,
    *,
    name: str = "default",
    seed: int = 1,
    model: nn.Module | None = None,
) -> nn.Module:
    """A base model with an adapter whose every tensor has random values, as after training."""
    model = base() if model is None else model
    apply_svp(model, config, adapter_name=name)
    randomise(model, name, seed)
    return model


def randomise(model: nn.Module, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter_state(model, name).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that a failed load could leave behind: tensors, flags, hooks, objects."""
    return {
        "tensors": {key: tensor.clone() for key, tensor in model.state_dict().items()},
        "flags": {key: p.requires_grad for key, p in model.named_parameters()},
        "hooks": {
            path: (list(m._forward_pre_hooks.values()), list(m._forward_hooks.values()))
            for path, m in model.named_modules()
        },
        "objects": {path: id(module) for path, module in model.named_modules()},
        "attributes": sorted(vars(model)),
        "training": {path: module.training for path, module in model.named_modules()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    ours, theirs = after.pop("tensors"), dict(before)["tensors"]
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert after == {key: value for key, value in before.items() if key != "tensors"}
