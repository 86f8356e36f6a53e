"""The stack of frozen blocks as one op, on a CPU: against its blocks one by one and the reference.

The kernels are emulated (cuda_on_cpu/__init__.py), the products are PyTorch's on a CPU.
"""

import copy
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from svp_peft import SVPConfig, VisionMamba, apply_svp, disable_adapter, ops
from svp_peft.ops.cuda import prompter_copies
from svp_peft.vim import stack
from tests.ops.cuda_cases import error
from tests.ops.cuda_on_cpu.gpu import EmulatedGpu

# by import_module: the package's attribute of this name is the function
frozen_stack = importlib.import_module("svp_peft.ops.cuda.frozen_stack")


def small_vim(depth: int = 4, **options: Any) -> VisionMamba:
    """A patched Vim in bfloat16 with every scale set, on the backend under test."""
    config = options.pop("config", SVPConfig(cross_group_size=2, inner_bottleneck=8))
    settings: dict[str, Any] = dict(
        img_size=24, patch_size=8, stride=8, embed_dim=16, depth=depth, num_classes=5,
        rms_norm=True, fused_add_norm=True, residual_in_fp32=True, bimamba_type="v2",
        if_cls_token=True, use_middle_cls_token=True, if_abs_pos_embed=True, if_divide_out=True,
        drop_path_rate=0.0, ssm_cfg={"dt_rank": 8},
    )  # fmt: skip
    torch.manual_seed(0)
    model = VisionMamba(**settings | options)
    if config is not None:
        apply_svp(model, config)
        with torch.no_grad():
            for scales in (model.svp.alpha, model.svp.beta):
                scales.normal_()
    else:
        model.requires_grad_(False)
    return model


@pytest.fixture
def on_cuda(gpu: EmulatedGpu) -> Iterator[EmulatedGpu]:
    before = ops.get_backend()
    ops.set_backend("cuda")
    yield gpu
    ops.set_backend(before)


def blocks_of(model: VisionMamba, x: Tensor) -> list[ops.FrozenBlock]:
    ops.set_backend("reference")
    for block in model.layers:  # a first call, so that the mixers know their weights
        with torch.no_grad():
            block.mixer(x)
    ops.set_backend("cuda")
    found = [stack._frozen(block, x) for block in model.layers]
    return [block for block in found if block is not None]


def one_by_one(blocks: list[ops.FrozenBlock], x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The reference."""
    for block in blocks:
        if block.prompt is not None:
            p = block.prompt
            x = ops.svp_prompt(
                x, *p.projections, p.alpha[p.alpha_row], p.beta[p.beta_row], skip=p.skip,
                backend="reference",
            )  # fmt: skip
        normed, residual = ops.add_norm(
            x, residual, block.norm_weight, block.norm_bias, eps=block.eps, rms=block.rms,
            backend="reference",
        )  # fmt: skip
        x = ops.mixer(normed, block.mixer, scale=block.mixer_scale, backend="reference")
    return x, residual


def trained_of(model: VisionMamba) -> list[Tensor]:
    """Trained by the stack: the head has no part in it."""
    return [p for n, p in model.named_parameters() if p.requires_grad and "head" not in n]


def gradients(model: VisionMamba, out: tuple[Tensor, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(3)
    total = sum((o.double() * torch.randn(o.shape).double()).sum() for o in out)
    return list(torch.autograd.grad(total, [*leaves, *trained_of(model)], allow_unused=True))


@pytest.mark.parametrize("keep", [0, 1 << 40], ids=["recompute", "keep"])
@pytest.mark.parametrize("fused", [False, True], ids=["inner given", "inner made"])
@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 10),
        ({"embed_dim": 48}, 3),  # [W | D] has 56 rows, and 8 more that fill it up
        ({"rms_norm": False}, 10),
        ({"config": SVPConfig(layers=[1, 3], cross_group_size=2, inner_bottleneck=8)}, 7),
        ({"bimamba_type": "none", "if_divide_out": False}, 5),
    ],
    ids=["all", "filled up", "layer norm", "some blocks", "one direction"],
)
def test_the_stack_is_right_with_every_gradient(
    options: dict[str, Any],
    length: int,
    fused: bool,
    keep: int,
    on_cuda: EmulatedGpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frozen_stack, "FUSED_UP", fused)
    monkeypatch.setattr(prompter_copies, "PADDED_ROWS", 64)
    monkeypatch.setattr("svp_peft.ops.stack_op.KEEP_PRE_ACTIVATIONS", keep)
    monkeypatch.setitem(ops.mixer_op._KEEP_EVERYTHING, "cpu", keep)
    model = small_vim(**options)
    width = options.get("embed_dim", 16)
    x = torch.randn(3, length, width).bfloat16().requires_grad_()
    residual = torch.randn(3, length, width).requires_grad_()
    blocks = blocks_of(model, x)
    on_cuda.launches.clear()
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.frozen_stack(x, residual, blocks, cache=ops.Cache())
    assert out is not None
    assert on_cuda.launches.count("pack_prompters") == 1
    prompted = sum(block.prompt is not None for block in blocks)
    entry = "prompt_up_norm_forward" if fused else "prompt_norm_forward"
    assert on_cuda.launches.count(entry) == prompted
    found = gradients(model, out, [x, residual])

    exact = copy.deepcopy(model).double()
    leaves = [t.detach().double().requires_grad_() for t in (x, residual)]
    truth = one_by_one(blocks_of(exact, leaves[0].detach()), *leaves)
    expected = gradients(exact, truth, leaves)
    assert error(out[0], truth[0]) < 3e-2
    assert error(out[1], truth[1]) < 3e-2
    for mine, true in zip(found, expected, strict=True):
        assert (mine is None) == (true is None)
        if mine is not None:
            assert mine.isfinite().all()
            assert error(mine, true) < 6e-2


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(
    ("width", "bottleneck", "filled"), [(64, 48, 128), (48, 24, 72), (48, 48, 96)]
)
def test_the_product_is_filled_up_with_zeros_where_that_adds_little(
    width: int, bottleneck: int, filled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 rows are a seventh of 112; 32 are a third of 96."""
    monkeypatch.setattr(prompter_copies, "PADDED_ROWS", 128)
    sizes = (
        (width, width),
        (width,),
        (bottleneck, width),
        (bottleneck,),
        (width, bottleneck),
        (width,),
    )
    weights = [torch.randn(size) for size in sizes]
    (packed,) = prompter_copies.Copies([weights], torch.bfloat16).renewed()
    own = width + bottleneck
    assert packed.padded.shape == (filled, width)
    assert packed.padded_bias.shape == (filled,)
    assert torch.equal(packed.padded[:own], packed.joint)
    assert torch.equal(packed.joint, torch.cat(weights[0:3:2]).bfloat16())
    assert torch.equal(packed.padded_bias[:own], torch.cat(weights[1:4:2]).bfloat16())
    assert torch.equal(packed.up, weights[4].bfloat16())
    assert torch.equal(packed.up_bias, weights[5].bfloat16())
    assert not packed.padded[own:].any()
    assert not packed.padded_bias[own:].any()


@pytest.mark.usefixtures("on_cuda")
def test_gradients_are_made_only_from_the_first_block_that_wants_one() -> None:
    config = SVPConfig(layers=[2, 3], cross_group_size=2, inner_bottleneck=8)
    model = small_vim(config=config)
    x, residual = torch.randn(2, 5, 16).bfloat16(), torch.randn(2, 5, 16)
    blocks = blocks_of(model, x)
    asked: list[int] = []
    mixers = [block.mixer_cache for block in blocks]
    with torch.autocast("cpu", torch.bfloat16):
        ops.frozen_stack(x, residual, blocks, cache=ops.Cache())
        for number, cache in enumerate(mixers):
            once = cache.prepared.backward

            def noted(*arguments: Any, once: Any = once, number: int = number) -> Tensor:
                asked.append(number)
                return once(*arguments)

            cache.prepared.backward = noted
        out = ops.frozen_stack(x, residual, blocks, cache=ops.Cache())
    assert out is not None
    found = gradients(model, out, [])
    assert asked == [3, 2]
    assert all(gradient is not None for gradient in found)


@pytest.mark.usefixtures("on_cuda")
def test_dropped_images_add_nothing_and_the_others_are_scaled_up() -> None:
    model = small_vim(depth=1, config=None)
    x, residual = torch.randn(64, 2, 16).bfloat16(), torch.randn(64, 2, 16)
    (block,) = blocks_of(model, x)
    torch.manual_seed(1)
    with torch.no_grad():
        out = ops.frozen_stack(x, residual, [block._replace(drop_rate=0.75)], cache=ops.Cache())
        all_dropped = ops.frozen_stack(
            x, residual, [block._replace(drop_rate=1.0)], cache=ops.Cache()
        )
    assert out is not None
    assert all_dropped is not None
    assert torch.equal(all_dropped[1], residual)
    stays = (out[1] != residual).flatten(1).any(1)
    assert 5 <= stays.sum() <= 30  # 16 expected, deviation 3.5
    assert torch.equal(out[1][~stays], residual[~stays])
    torch.testing.assert_close(out[1][stays], residual[stays] + 4 * x[stays].float())


@pytest.mark.usefixtures("on_cuda")
def test_a_changed_prompter_is_used_and_noticed() -> None:
    model = small_vim(depth=2)
    x, residual = torch.randn(2, 5, 16).bfloat16(), torch.randn(2, 5, 16)
    blocks, cache = blocks_of(model, x), ops.Cache()
    with torch.autocast("cpu", torch.bfloat16):
        first = ops.frozen_stack(x, residual, blocks, cache=cache)
        model.svp.inner[0].up.bias.data.add_(1.0)
        second = ops.frozen_stack(x, residual, blocks, cache=cache)
    assert first is not None
    assert second is not None
    assert not torch.equal(first[0], second[0])
    with torch.no_grad():
        model.svp.cross[0].weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first[0].sum().backward()


def test_what_is_wrapped_hooked_or_trained_is_called() -> None:
    model = small_vim(depth=2)
    block = model.layers[1]
    x = torch.randn(1, 5, 16).bfloat16()
    with torch.no_grad():
        block.mixer(x.float())

    def served() -> bool:
        return stack._frozen(block, x) is not None

    def nothing(*_: Any) -> None:
        return None

    assert served()
    for module in (block, block.mixer, block.norm, block.mixer.in_proj, model.svp):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(nothing)
            assert not served()
            handle.remove()
            assert served()
    for parameter in (block.norm.weight, block.mixer.A_log, block.mixer.conv1d_b.bias):
        parameter.requires_grad_(True)
        assert not served()
        parameter.requires_grad_(False)
    with disable_adapter(model):
        bare = stack._frozen(block, x)
    assert bare is not None
    assert bare.prompt is None
    assert served()
