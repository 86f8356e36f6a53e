import pytest
import torch
from torch import nn

from svp_peft.backbones import BackboneSpec
from svp_peft.config import SVPConfig
from svp_peft.errors import AlreadyAppliedError, BackboneNotSupportedError
from svp_peft.patch import apply_svp
from svp_peft.verify import verify_backbone
from tests.lookalikes import VimLike
from tests.test_backbones import MODELS, case  # noqa: F401  # a fixture

SPECIALS = {"middle": (8,), "head": (0,), "double": (0, 17), "none": ()}


def test_every_family_verifies_and_is_left_as_it_was(case):  # noqa: F811
    model, inputs, family, class_tokens, head = case
    model.train()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    report = verify_backbone(model, inputs)
    assert (report.family, report.head) == (family, head)
    expected = SPECIALS.get(class_tokens, class_tokens)
    assert report.unprompted[0] == expected
    assert len(report.unprompted) == len(report.widths) == len(report.token_shapes)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert "svp" not in model._modules


def test_a_wrong_class_token_is_found_by_where_its_parameter_goes():
    spec = BackboneSpec(blocks="layers", class_tokens="head")
    with pytest.raises(BackboneNotSupportedError, match=r"class_tokens=\(8,\)"):
        verify_backbone(VimLike("middle"), torch.randn(2, 3, 16, 16), backbone=spec)


def test_blocks_that_do_not_run_are_named():
    model = VimLike()
    model.layers.append(nn.Identity())
    model.layers.append(VimLike().layers[0])
    model.forward_features = lambda x, _: nn.Module.__call__(model.layers[0], x)[0]
    model.layers[4].weight = nn.Parameter(torch.zeros(1))
    model.head = nn.Identity()
    model.patch_embed = nn.Identity()
    spec = BackboneSpec(blocks=("layers.0", "layers.3"), class_tokens="none")
    with pytest.raises(BackboneNotSupportedError, match=r"\['layers\.3'\] did not run"):
        verify_backbone(model, torch.randn(2, 5, 16), backbone=spec)
    assert "svp" not in model._modules


def test_a_model_that_draws_random_numbers_in_eval_mode_cannot_be_verified():
    model = VimLike()
    model.head = _Noise()
    with pytest.raises(BackboneNotSupportedError, match="two outputs for one batch"):
        verify_backbone(model, torch.randn(2, 3, 16, 16))


def test_a_patched_model_is_refused():
    model = apply_svp(VimLike(), SVPConfig())
    with pytest.raises(AlreadyAppliedError):
        verify_backbone(model, torch.randn(2, 3, 16, 16))


class _Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)
