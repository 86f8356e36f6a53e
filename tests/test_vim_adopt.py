"""`VisionMamba.from_model`: a fork's model under our forward pass, with its own parameters."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from svp_peft import VisionMamba, apply_svp
from svp_peft.errors import InputError
from svp_peft.vim.block import DropPath
from tests.vim_files import tiny_vim

FLAGS = (
    "final_pool_type fused_add_norm residual_in_fp32 if_bidirectional if_rope_residual "
    "flip_img_sequences_ratio use_middle_cls_token num_classes"
).split()


def small_vim(**arguments: Any) -> VisionMamba:
    return tiny_vim(**{"img_size": 64, **arguments})


class Fork(nn.Module):
    """A module of another package: it has the names of one of ours and none of its code."""

    def __init__(self, like: nn.Module, attributes: dict[str, Any]) -> None:
        super().__init__()
        for name, parameter in like._parameters.items():
            copied = None if parameter is None else nn.Parameter(parameter.detach().clone())
            self.register_parameter(name, copied)
        for name, buffer in like._buffers.items():
            self.register_buffer(name, buffer.clone())
        for name, value in attributes.items():
            setattr(self, name, value)


def fork_of(model: VisionMamba, divide_flag: str | None = "if_divide_out") -> Any:
    """A model as an authors' fork builds it, with the weights of `model`."""

    def build(module: nn.Module, path: str) -> nn.Module:
        known = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm, nn.Identity, nn.Dropout, DropPath)
        if isinstance(module, known):
            return module
        attributes: dict[str, Any] = {}
        if path == "":
            attributes = {name: getattr(module, name) for name in FLAGS}
        elif path == "patch_embed":
            attributes = {"img_size": module.img_size}
        elif path.endswith("mixer") and divide_flag is not None:
            attributes = {divide_flag: module.if_divide_out}
        elif hasattr(module, "eps"):
            attributes = {"eps": module.eps}
        shell: nn.Module = (
            nn.ModuleList() if isinstance(module, nn.ModuleList) else Fork(module, attributes)
        )
        for name, child in module.named_children():
            shell.add_module(name, build(child, f"{path}.{name}".lstrip(".")))
        return shell

    return build(model, "").eval()


def image_for(model: VisionMamba) -> torch.Tensor:
    return torch.randn(2, 3, *model.img_size)


@pytest.mark.parametrize("spelling", ["if_divide_out", "if_devide_out"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"if_divide_out": False},
        {"use_middle_cls_token": False, "if_rope": True, "if_rope_residual": True},
        {"use_double_cls_token": True, "rms_norm": False, "norm_epsilon": 1e-2},
        {"if_cls_token": False, "final_pool_type": "mean", "if_abs_pos_embed": False},
        {"if_bidirectional": True, "stride": 8},
        {"fused_add_norm": False, "bimamba_type": "v1", "img_size": (32, 64)},
        {"num_classes": 0, "init_layer_scale": 0.2},
    ],
    ids=str,
)
def test_the_adopted_model_is_the_forks(arguments: dict[str, Any], spelling: str) -> None:
    model = small_vim(**arguments)
    fork = fork_of(model, spelling)
    ours = VisionMamba.from_model(fork)
    assert not ours.training
    image = image_for(model)
    assert torch.equal(ours(image), model(image))
    assert ours.num_classes == model.num_classes
    theirs = dict(fork.named_parameters())
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    assert all(parameter is theirs[name] for name, parameter in ours.named_parameters())


def test_a_change_of_one_model_is_seen_by_the_other() -> None:
    model, other = small_vim(), small_vim()
    fork = fork_of(model)
    ours = VisionMamba.from_model(fork)
    fork.load_state_dict(other.state_dict())
    image = image_for(model)
    assert torch.equal(ours(image), other(image))
    with torch.no_grad():
        ours.head.bias.add_(1.0)
    assert torch.equal(fork.head.bias, other.head.bias + 1.0)


def test_a_fork_without_the_option_to_divide_does_not_divide() -> None:
    model = small_vim(if_divide_out=False)
    ours = VisionMamba.from_model(fork_of(model, None))
    image = image_for(model)
    assert torch.equal(ours(image), model(image))
    divided = VisionMamba.from_model(fork_of(model, None), if_divide_out=True)
    assert divided.layers[0].mixer.if_divide_out


def test_stochastic_depth_and_the_training_flag_are_taken_over() -> None:
    fork = fork_of(small_vim(depth=4, drop_path_rate=0.3, drop_rate=0.2)).train()
    ours = VisionMamba.from_model(fork)
    assert ours.training
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in ours.layers]
    assert rates == pytest.approx([0.0, 0.0, 0.1, 0.2])
    assert ours.drop_path.drop_prob == 0.3
    assert ours.pos_drop.p == 0.2


def test_the_two_layer_head_of_the_released_code_is_shared_as_it_is() -> None:
    model = small_vim()
    fork = fork_of(model)
    fork.head = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3))
    ours = VisionMamba.from_model(fork)
    assert ours.head is fork.head
    assert ours.num_classes == 3
    assert ours(image_for(model)).shape == (2, 3)
    del fork.head
    assert isinstance(VisionMamba.from_model(fork).head, nn.Identity)


def test_a_class_token_of_unknown_place_is_asked_for() -> None:
    model = small_vim(use_middle_cls_token=False)
    fork = fork_of(model)
    del fork.use_middle_cls_token
    with pytest.raises(InputError, match="does not say where"):
        VisionMamba.from_model(fork)
    image = image_for(model)
    told = VisionMamba.from_model(fork, use_middle_cls_token=False)
    assert torch.equal(told(image), model(image))
    # the released SVP code knows no other place than the middle
    fork.transfer_type = "none"
    assert VisionMamba.from_model(fork).use_middle_cls_token


def with_parameter(name: str) -> Any:
    fork = fork_of(small_vim())
    fork.register_parameter(name, nn.Parameter(torch.zeros(24, 16)))
    return fork


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "Linear is not a Vim: it has no ModuleList 'layers'"),
        (nn.Sequential(OrderedDict(layers=nn.ModuleList())), "no ModuleList 'layers' with blocks"),
        (nn.Sequential(OrderedDict(layers=nn.ModuleList([nn.Linear(2, 2)]))), "not a Vim's state"),
        (with_parameter("register"), r"has \['register'\] besides"),
        (with_parameter("pos_embed_cls"), r"not a Vim: it has \['pos_embed_cls'\]"),
        (apply_svp(fork_of(small_vim())), "carries SVP adapters"),
        (torch.compile(fork_of(small_vim())), "without a wrapper around it"),
        ({"model": {}}, "takes a torch.nn.Module and got a dict"),
        (with_parameter("prompt_scale"), "convert_svp_checkpoint"),
    ],
)
def test_what_is_not_a_vim_is_refused(model: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        VisionMamba.from_model(model)


def test_an_unknown_override_is_refused() -> None:
    with pytest.raises(InputError, match="divide"):
        VisionMamba.from_model(fork_of(small_vim()), divide=True)
