import random
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from svp_peft.backbones import BackboneSpec
from svp_peft.config import SVPConfig
from svp_peft.errors import AlreadyAppliedError, BackboneNotSupportedError
from svp_peft.patch import apply_svp
from svp_peft.verify import verify_backbone
from tests.lookalikes import Classifier, VimLike
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


def test_positions_given_by_hand_may_be_of_other_tokens_besides_the_class_token():
    spec = BackboneSpec(blocks="layers", class_tokens=(3, 8))
    report = verify_backbone(VimLike("middle"), torch.randn(2, 3, 16, 16), backbone=spec)
    assert report.unprompted[0] == (3, 8)
    spec = BackboneSpec(blocks="layers", class_tokens=(3, 7))
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


def test_a_model_that_draws_random_numbers_in_eval_mode_draws_the_same_ones_every_time():
    model = VimLike()
    model.head = _Noise()
    images = torch.randn(2, 3, 16, 16)
    generators = torch.get_rng_state(), random.getstate()
    assert verify_backbone(model, images).unprompted[0] == (8,)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]


def test_a_model_that_remembers_its_calls_cannot_be_verified():
    model = VimLike()
    model.head = _Counter()
    with pytest.raises(BackboneNotSupportedError, match="two outputs for one batch"):
        verify_backbone(model, torch.randn(2, 3, 16, 16))


def test_weights_that_multiply_otherwise_once_frozen_are_no_fault_of_the_adapter():
    # as torch.matmul does: 3-D tokens that are not contiguous are folded only if the weight
    # requires gradients
    model = VimLike()
    for layer in model.layers:
        layer.mixer = _MultipliesOtherwiseOnceFrozen(layer.mixer)
    flags = [p.requires_grad for p in model.parameters()]
    assert verify_backbone(model, torch.randn(2, 3, 16, 16)).unprompted[0] == (8,)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert any(flags)


def test_prompts_that_reach_no_output_are_reported():
    model = VimLike()
    nn.init.zeros_(model.head.weight)
    with pytest.raises(BackboneNotSupportedError, match="no prompter would ever train"):
        verify_backbone(model, torch.randn(2, 3, 16, 16))


def test_a_class_token_is_found_inside_a_larger_model_whose_spec_names_no_owner():
    spec = BackboneSpec(blocks="backbone.net.layers", class_tokens=(7,))
    model = Classifier(_Features(VimLike(num_classes=0)))
    with pytest.raises(BackboneNotSupportedError, match=r"class_tokens=\(8,\)"):
        verify_backbone(model, torch.randn(2, 3, 16, 16), backbone=spec)


def test_outputs_in_dataclasses_are_compared_and_others_are_refused():
    class Wrapped(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.net, self.kind = VimLike(), kind

        def forward(self, x):
            return self.kind(self.net(x))

    images = torch.randn(2, 3, 16, 16)
    assert verify_backbone(Wrapped(_Output), images).family == "vim"
    with pytest.raises(BackboneNotSupportedError, match="returned no tensor"):
        verify_backbone(Wrapped(str), images)


def test_a_patched_model_is_refused():
    model = apply_svp(VimLike(), SVPConfig())
    with pytest.raises(AlreadyAppliedError):
        verify_backbone(model, torch.randn(2, 3, 16, 16))


@dataclass
class _Output:
    logits: torch.Tensor


class _Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x) + random.random()


class _Counter(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.calls


class _MultipliesOtherwiseOnceFrozen(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x, inference_params=None):
        return self.mixer(x) * (1.0 if self.mixer.in_proj.weight.requires_grad else 1.0 + 1e-6)


class _Features(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return (self.net(x)[:, None],)
