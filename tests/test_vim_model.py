"""Every constructor option of the built-in Vim."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from typing import Any

import pytest
import torch
from torch import nn

from svp_peft import VisionMamba, ops
from svp_peft.errors import InputError
from svp_peft.vim.block import DropPath
from svp_peft.vim.mixer import VimMixer
from tests import vim_oracle

SMALL: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "stride": 4,
    "embed_dim": 16,
    "depth": 2,
    "d_state": 4,
    "num_classes": 5,
}
"""16 patches; every axis has a length of its own, so that none can stand in for another."""

CLASS_TOKENS = [
    {},
    {"use_middle_cls_token": False},
    {"use_double_cls_token": True},
    *({"if_cls_token": False, "final_pool_type": pool} for pool in ("none", "mean", "max", "all")),
]
IMAGES = [
    {},
    {"img_size": (12, 20)},
    {"img_size": (12, 12)},
    {"stride": 2, "img_size": 10},
    {"img_size": 4},
]
NORMS = [
    {"rms_norm": rms, "fused_add_norm": fused, "residual_in_fp32": wide}
    for rms, fused, wide in itertools.product((True, False), repeat=3)
]
MIXERS = [
    {},
    {"if_divide_out": False},
    {"bimamba_type": "v1"},
    {"bimamba_type": "none"},
    {"if_bimamba": True},
    {"init_layer_scale": 0.3},
    {"ssm_cfg": {"d_conv": 3, "expand": 1, "dt_rank": 5, "bias": True, "conv_bias": False}},
    {"bimamba_type": "v1", "ssm_cfg": {"bias": True}},
    {"bimamba_type": "none", "ssm_cfg": {"bias": True, "dt_init": "constant"}},
]
STACKS = [
    {},
    {"if_abs_pos_embed": False},
    {"if_bidirectional": True, "depth": 4},
    {"if_bidirectional": True, "depth": 3},
    {"if_bidirectional": True, "depth": 1},
    {"flip_img_sequences_ratio": 2.0},
    {"depth": 1},
]
ROPE = [
    {"if_rope": True, **extra}
    for extra in (
        {},
        {"if_rope_residual": True},
        {"use_middle_cls_token": False, "if_rope_residual": True},
        {"if_cls_token": False, "final_pool_type": "mean"},
        {"if_bidirectional": True, "depth": 4, "if_rope_residual": True},
        {"flip_img_sequences_ratio": 2.0, "if_rope_residual": True},
        {"flip_img_sequences_ratio": 2.0, "if_bidirectional": True, "depth": 3},
        {"pt_hw_seq_len": 7, "if_abs_pos_embed": False},
    )
]


def combinations() -> list[dict[str, Any]]:
    """Every option once, then forty random combinations of all of them."""
    groups = (CLASS_TOKENS, IMAGES, NORMS, MIXERS, STACKS)
    found = [option for group in (*groups, ROPE) for option in group]
    draw = random.Random(2412)
    found += [
        {key: value for group in groups for key, value in draw.choice(group).items()}
        for _ in range(40)
    ]
    return found


def small_model(**arguments: Any) -> VisionMamba:
    """A model whose parameters are all random, so that none can be left out unnoticed."""
    model = VisionMamba(**{**SMALL, **arguments})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("A_log"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def image_for(model: VisionMamba, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *model.img_size, dtype=model.norm_f.weight.dtype)


@pytest.mark.parametrize("arguments", combinations(), ids=str)
def test_every_combination_of_options_agrees_with_a_second_implementation(
    arguments: dict[str, Any],
) -> None:
    model = small_model(**arguments).double()
    image = image_for(model, batch=1 if "depth" in arguments else 2).requires_grad_()
    state = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    expected = vim_oracle.logits(state, image, {**SMALL, **arguments})
    found = model(image)
    assert found.shape == expected.shape
    cotangent = torch.randn_like(expected)
    names = [name for name, _ in model.named_parameters()]
    theirs = torch.autograd.grad(
        (expected * cotangent).sum(), [image, *(state[n] for n in names)], allow_unused=True
    )
    ours = torch.autograd.grad(
        (found * cotangent).sum(), [image, *model.parameters()], allow_unused=True
    )
    # double precision: only the order of additions differs
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    for name, a, b in zip(["input", *names], ours, theirs, strict=True):
        none_is_zero = (torch.zeros(()) if g is None else g for g in (a, b))
        left, right = torch.broadcast_tensors(*none_is_zero)
        torch.testing.assert_close(
            left, right, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_half_of_the_directions_sum_is_what_the_old_spelling_turns_off_too() -> None:
    torch.manual_seed(3)
    model = small_model(if_devide_out=False)
    assert not any(block.mixer.if_divide_out for block in model.layers)
    with pytest.raises(InputError, match="old spelling"):
        VisionMamba(**SMALL, if_divide_out=True, if_devide_out=False)


def test_images_of_another_size_are_refused_with_both_sizes() -> None:
    with pytest.raises(InputError, match=r"\(2, 3, 16, 20\).*16, 16"):
        small_model()(torch.randn(2, 3, 16, 20))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("arguments", MIXERS[:4])
def test_an_empty_batch_gives_no_logits_and_empty_gradients(
    arguments: dict[str, Any], backend: str
) -> None:
    model = VisionMamba(**{**SMALL, **arguments}).train()
    images = torch.empty(0, 3, 16, 16, requires_grad=True)
    ops.set_backend(backend)
    try:
        logits = model(images)
        logits.sum().backward()
    finally:
        ops.set_backend("auto")
    assert logits.shape == (0, 5)
    assert images.grad is not None
    assert images.grad.shape == images.shape
    assert not model.layers[0].mixer.in_proj.weight.grad.any()


def test_token_by_token_decoding_is_refused() -> None:
    model = small_model()
    with pytest.raises(InputError, match="inference_params"):
        model(image_for(model), inference_params=object())


def test_a_class_token_at_a_random_place_is_read_from_that_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # without position embeddings a class token at 8 of 16 is a middle one
    model = small_model(if_abs_pos_embed=False, use_middle_cls_token=False).double()
    middle = small_model(if_abs_pos_embed=False).double()
    middle.load_state_dict(model.state_dict())
    image = image_for(model)
    monkeypatch.setattr(random, "randint", lambda low, high: high // 2)
    at_random = model(image, if_random_cls_token_position=True)
    torch.testing.assert_close(at_random, middle(image))
    assert not torch.allclose(at_random, model(image))


def test_shuffled_tokens_are_followed_by_the_class_token(monkeypatch: pytest.MonkeyPatch) -> None:
    # reversing is a shuffle that can be undone by swapping the two directions
    model = small_model(if_divide_out=False, use_double_cls_token=True).double()
    swapped = copy.deepcopy(model)
    state = model.state_dict()
    for name in list(state):
        base = name.replace("A_b_log", "A_log").replace("_b.", ".").removesuffix("_b")
        if base != name:
            state[name], state[base] = state[base], state[name]
    swapped.load_state_dict(state)
    image = image_for(model)
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n - 1, -1, -1))
    torch.testing.assert_close(swapped(image, if_random_token_rank=True), model(image))


def test_drop_path_drops_whole_samples_while_training_and_never_in_the_first_two_blocks() -> None:
    model = small_model(depth=4, drop_path_rate=0.9)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.layers]
    assert rates == pytest.approx([0.0, 0.0, 0.3, 0.6])
    assert model.drop_path.drop_prob == 0.9
    layer = DropPath(0.25)
    x = torch.ones(4000, 3, 2)
    kept = layer(x)
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (kept == kept[:, :1, :1]).all()
    # a mean of 4000 coin flips; the standard deviation is 0.009
    assert kept.mean().item() == pytest.approx(1.0, abs=0.05)
    assert layer.eval()(x) is x


def test_training_mode_without_dropout_equals_evaluation_mode() -> None:
    model = small_model(drop_path_rate=0.0)
    image = image_for(model)
    assert torch.equal(model.train()(image), model.eval()(image))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = small_model(drop_path_rate=0.5, depth=3).train()
    image = image_for(model)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(7)
        model.zero_grad()
        model(image).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.set_grad_checkpointing()
    for kept, recomputed in zip(plain, gradients(), strict=True):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize("arguments", [{}, {"rms_norm": False}, {"fused_add_norm": False}])
def test_autocast_to_bfloat16_stays_close_to_single_precision(arguments: dict[str, Any]) -> None:
    model = small_model(**arguments, drop_path_rate=0.0).train()
    image = image_for(model)
    expected = model(image)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(image)
    found.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # bfloat16 keeps eight bits: 0.4% per operation, and there are a few dozen in a row
    error = (found.float() - expected).norm() / expected.norm()
    assert error < 0.05


def test_under_autocast_the_residual_stream_stays_in_single_precision() -> None:
    model = small_model()
    dtypes = []
    for block in model.layers:
        block.register_forward_hook(lambda _, i, out: dtypes.append((out[0].dtype, out[1].dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        model(image_for(model))
    assert dtypes == [(torch.bfloat16, torch.float32)] * 2


@pytest.mark.parametrize("wide", [True, False])
def test_a_half_precision_model_keeps_the_residual_in_the_dtype_asked_for(wide: bool) -> None:
    model = small_model(residual_in_fp32=wide).bfloat16()
    residuals = []
    for block in model.layers:
        block.register_forward_hook(lambda _, i, out: residuals.append(out[1].dtype))
    assert model(image_for(model)).dtype == torch.bfloat16
    assert residuals == [torch.float32 if wide else torch.bfloat16] * 2


@pytest.mark.parametrize("path", ["layers.0.norm", "norm_f"])
def test_a_wrapped_norm_is_called(path: str) -> None:
    model = small_model()
    image = image_for(model)
    expected = model(image)
    calls = []
    model.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(image), expected)
    assert calls == [1]


@pytest.mark.parametrize("half", ["autocast", "weights"])
@pytest.mark.parametrize("path", ["in_proj", "conv1d_b", "x_proj", "dt_proj"])
def test_a_wrapped_projection_gives_the_same_in_bfloat16(path: str, half: str) -> None:
    model = small_model()
    image = image_for(model)
    if half == "weights":
        model, image = model.bfloat16(), image.bfloat16()

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
            return model(image).float()

    expected = run()
    for block in model.layers:
        block.mixer.get_submodule(path).register_forward_hook(lambda *_: None)
    found = run()
    # bfloat16 keeps eight bits; the two ways round in different places
    assert (found - expected).norm() / expected.norm() < 0.05


def test_a_replaced_projection_is_called() -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    model = small_model(depth=1)
    image = image_for(model)
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        doubled.layers[0].mixer.out_proj.weight.mul_(2)
    model.layers[0].mixer.out_proj = Doubled(model.layers[0].mixer.out_proj)
    torch.testing.assert_close(model(image), doubled(image))


def test_a_parametrised_weight_is_used() -> None:
    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    model = small_model(depth=1)
    image = image_for(model)
    halved = copy.deepcopy(model)
    with torch.no_grad():
        halved.layers[0].mixer.conv1d_b.weight.div_(2)
    torch.nn.utils.parametrize.register_parametrization(
        model.layers[0].mixer.conv1d_b, "weight", Half()
    )
    torch.testing.assert_close(model(image), halved(image))


def test_copies_and_pickles_give_the_same_logits() -> None:
    model = small_model()
    image = image_for(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(image), model(image))


def test_a_new_head_has_the_classes_asked_for() -> None:
    model = small_model()
    features = model(image_for(model), return_features=True)
    assert features.shape == (2, 16)
    model.reset_classifier(9)
    assert model.num_classes == 9
    assert model(image_for(model)).shape == (2, 9)
    model.reset_classifier(0, global_pool="mean")
    assert model(image_for(model)).shape == (2, 16)


def test_without_classes_the_model_returns_features() -> None:
    model = small_model(num_classes=0)
    image = image_for(model)
    assert torch.equal(model(image), model.forward_features(image))
    assert not any(name.startswith("head") for name in model.state_dict())


def test_a_new_model_is_initialised_as_the_official_one() -> None:
    model = VisionMamba(img_size=64, patch_size=8, stride=8, embed_dim=128, depth=12)
    mixer = model.layers[3].mixer
    assert torch.equal(mixer.A_log, torch.arange(1, 17).log().repeat(256, 1))
    assert torch.equal(mixer.A_b_log, mixer.A_log)
    assert torch.equal(mixer.D, torch.ones(256))
    # the time step after the softplus lies in [dt_min, dt_max]; rounding may touch the ends
    step = nn.functional.softplus(mixer.dt_proj.bias)
    assert 0.00099 < step.min() < 0.002
    assert 0.05 < step.max() < 0.101
    assert mixer.dt_proj.weight.abs().max() <= 8**-0.5
    # the official code leaves the backward projection at PyTorch's default and zeroes its bias
    assert not mixer.dt_proj_b.bias.any()
    # uniform with bound 1 / sqrt(256), shrunk by sqrt(depth)
    bound = 256**-0.5 / 12**0.5
    assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound
    # 200 to 100,000 samples of a normal distribution: a tenth is far outside of chance
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(192**-0.5, rel=0.1)
    assert not model.head.bias.any()
    assert not model.patch_embed.proj.bias.any()


def test_layer_scale_starts_at_the_value_given() -> None:
    mixer = VimMixer(16, init_layer_scale=0.1)
    assert torch.equal(mixer.gamma, torch.full((16,), 0.1))


def test_the_attributes_that_training_scripts_read() -> None:
    model = small_model()
    assert (model.num_classes, model.num_features, model.d_model, model.embed_dim) == (
        5,
        16,
        16,
        16,
    )
    assert model.img_size == (16, 16)
    assert model.no_weight_decay() >= {"pos_embed", "cls_token"}
    assert model.get_classifier() is model.head
    assert [block.layer_idx for block in model.layers] == [0, 1]


def test_the_model_can_be_built_without_memory() -> None:
    model = VisionMamba(**SMALL, device="meta")
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_model_can_be_built_in_another_dtype(dtype: torch.dtype) -> None:
    model = VisionMamba(**SMALL, dtype=dtype).eval()
    ops.set_backend("auto")
    assert model(image_for(model)).dtype == dtype
    exact = torch.promote_types(dtype, torch.float32)
    assert model.layers[0].mixer.A_log.dtype == exact
