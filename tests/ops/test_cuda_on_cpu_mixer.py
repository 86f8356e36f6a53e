"""What is composed of the CUDA kernels, on a CPU: the mixers, the joint prompt, a whole model.

The kernels are emulated (cuda_on_cpu/__init__.py), the products are PyTorch's on a CPU. Bounds on
||found - truth|| / ||truth||: float32 has the kernels' 1e-5; in bfloat16 the gradient of dt_weight
is a small sum of large numbers, where the reference in bfloat16 is wrong by 4e-2 too.
"""

from importlib import import_module

import pytest
import torch
from torch import Tensor

from svp_peft import SVPConfig, VisionMamba, apply_svp, ops
from svp_peft.ops import cuda, mixer_op, reference
from svp_peft.ops.mixer_passes import pack, unpack
from svp_peft.ops.types import Cache, MixerWeights
from tests.ops.cuda_cases import error, mixer_weights
from tests.ops.cuda_on_cpu.gpu import EmulatedGpu

KINDS = {"none": (1, 1), "v1": (1, 2), "v2": (2, 2)}  # convolutions and scans
BOUND = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


def double(weights: MixerWeights) -> MixerWeights:
    return unpack(tuple(None if t is None else t.double() for t in pack(weights)))


@pytest.mark.parametrize("keep", [1, 2], ids=["recompute", "keep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("gpu")
def test_the_mixer_is_right_with_every_gradient(kind: str, dtype: torch.dtype, keep: int) -> None:
    convolutions, scans = KINDS[kind]
    weights = mixer_weights(16, 8, 16, scans, convolutions=convolutions, bias=True)
    x = torch.randn(2, 19, 16).to(dtype)
    given = [t if t is None else t.clone().requires_grad_() for t in (x, *pack(weights))]
    leaves = [t for t in given if t is not None]
    out = mixer_op._Mixer.apply(*given, 0.5, dtype, "cuda", keep)[0]
    cotangent = torch.randn(out.shape).to(dtype)
    found = torch.autograd.grad(out, leaves, cotangent)
    exact = [t if t is None else t.detach().double().requires_grad_() for t in given]
    truth = reference.mixer(exact[0], unpack(tuple(exact[1:])), scale=0.5)
    flat = [t for t in exact if t is not None]
    assert error(out, truth) < BOUND[dtype]
    for gradient, true in zip(
        found, torch.autograd.grad(truth, flat, cotangent.double()), strict=True
    ):
        assert error(gradient, true) < BOUND[dtype]


@pytest.mark.parametrize("keep", [1, 2], ids=["recompute", "keep"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(
    ("shape", "rank", "state", "dtype"),
    [
        ((3, 1, 16), 8, 16, torch.bfloat16),
        ((2, 2, 16), 8, 16, torch.bfloat16),
        ((1, 65, 32), 16, 8, torch.bfloat16),
        ((2, 37, 64), 8, 16, torch.float16),
        ((2, 19, 32), 12, 16, torch.bfloat16),  # rows that no copy of 16 bytes fits
    ],
)
def test_the_prepared_mixer_is_as_exact_as_the_general_one(
    shape: tuple[int, int, int],
    rank: int,
    state: int,
    dtype: torch.dtype,
    directions: int,
    keep: int,
    gpu: EmulatedGpu,
) -> None:
    weights = mixer_weights(shape[2], rank, state, directions, bias=shape[1] == 65)
    x = torch.randn(shape).to(dtype)
    cotangent = torch.randn(shape).to(dtype)
    exact_x = x.double().requires_grad_()
    truth = reference.mixer(exact_x, double(weights), scale=0.5)
    (true_grad,) = torch.autograd.grad(truth, exact_x, cotangent.double())
    prepared = cuda.frozen_mixer(weights, dtype, 0.5)
    assert prepared is not None

    errors, launches = [], []
    for general in (True, False):
        gpu.launches.clear()
        leaf = x.clone().requires_grad_()
        if general:
            out = mixer_op._Mixer.apply(leaf, *pack(weights), 0.5, dtype, "cuda", keep)[0]
        else:
            out = prepared(leaf, keep)
        (grad,) = torch.autograd.grad(out, leaf, cotangent)
        errors.append((error(out, truth.detach()), error(grad, true_grad)))
        launches.append(list(gpu.launches))
    assert launches[0][-1] == "conv_backward"
    assert launches[1] == [*launches[0][:-1], "conv_backward_projected"]
    assert max(errors[0]) < BOUND[dtype]
    # the same roundings at the same places, one of d_u less; the products may be split differently
    assert errors[1][0] <= 1.1 * errors[0][0] + 1e-4
    assert errors[1][1] <= 1.1 * errors[0][1] + 1e-4
    with torch.no_grad():
        assert error(prepared(x, 0), truth.detach()) < BOUND[dtype]


@pytest.mark.parametrize("directions", [1, 2])
def test_the_product_inside_the_convolution_changes_roundings_only(
    directions: int, gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = mixer_weights(32, 8, 16, directions)
    x, cotangent = torch.randn(2, 2, 19, 32).bfloat16()
    found = []
    for fold in (False, True):
        monkeypatch.setattr(import_module("svp_peft.ops.cuda.frozen_mixer"), "_FOLD", fold)
        prepared = cuda.frozen_mixer(weights, torch.bfloat16, 0.5)
        assert prepared is not None
        leaf = x.clone().requires_grad_()
        found += torch.autograd.grad(prepared(leaf, 1), leaf, cotangent)
        assert gpu.launches[-1] == ("conv_backward_projected" if fold else "conv_backward")
    assert error(found[1], found[0].double()) < 1e-2  # three roundings to bfloat16


@pytest.mark.usefixtures("gpu")
def test_the_prepared_mixer_follows_a_weight_that_is_written_to() -> None:
    weights = mixer_weights(16, 8, 16, 2)
    x = torch.randn(2, 9, 16).bfloat16()
    prepared = cuda.frozen_mixer(weights, torch.bfloat16, 1.0)
    assert prepared is not None
    for tensor in (weights.in_proj_weight, weights.x_proj_weight[1], weights.A_log[0]):
        tensor.mul_(1.5)
        assert prepared.is_for(torch.bfloat16, 1.0)
        renewed = cuda.frozen_mixer(weights, torch.bfloat16, 1.0)
        assert renewed is not None
        assert torch.equal(prepared(x, 0), renewed(x, 0))


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
@pytest.mark.parametrize(
    ("dtype", "product"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
@pytest.mark.usefixtures("gpu")
def test_the_joint_prompt_is_right_with_every_gradient(
    dtype: torch.dtype, product: torch.dtype, keep: bool
) -> None:
    width, bottleneck = 48, 12
    sizes = [(width, width), (width,), (bottleneck, width), (bottleneck,)]
    sizes += [(width, bottleneck), (width,), (width,), (width,)]
    x = torch.randn(2, 9, width).to(dtype).requires_grad_()
    tensors = [(torch.randn(s) * s[-1] ** -0.5).requires_grad_() for s in sizes]
    cotangent = torch.randn(x.shape).to(dtype)
    cache = Cache()
    for _ in range(2):  # the second time with weights that an optimizer has changed
        out = cuda.joint_prompt(x, tensors, (0, 4), product, keep, cache)
        found = torch.autograd.grad(out, [x, *tensors], cotangent)
        exact = [t.detach().double().requires_grad_() for t in (x, *tensors)]
        truth = ops.svp_prompt(*exact, skip=(0, 4), backend="reference")
        expected = torch.autograd.grad(truth, exact, cotangent.double())
        assert out.dtype == dtype
        assert torch.equal(out[:, (0, 4)], x[:, (0, 4)])
        assert error(out, truth.detach()) < BOUND[product]
        for gradient, true, leaf in zip(found, expected, (x, *tensors), strict=True):
            assert gradient.dtype == leaf.dtype
            assert error(gradient, true) < BOUND[product]
        for tensor in tensors:
            tensor.data.mul_(0.9)


def test_a_whole_model_with_its_prompts_is_right(gpu: EmulatedGpu) -> None:
    model = VisionMamba(
        img_size=24, patch_size=8, stride=8, embed_dim=16, depth=2, num_classes=5, rms_norm=True,
        fused_add_norm=True, residual_in_fp32=True, bimamba_type="v2", if_cls_token=True,
        use_middle_cls_token=True, if_abs_pos_embed=True, if_divide_out=True, drop_path_rate=0.0,
    )  # fmt: skip
    apply_svp(model, SVPConfig())
    with torch.no_grad():
        model.svp.alpha.normal_()
        model.svp.beta.normal_()
    images = torch.randn(2, 3, 24, 24)

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        before = ops.get_backend()
        ops.set_backend(backend)
        try:
            model.to(dtype).zero_grad()
            logits = model(images.to(dtype))
            logits.square().sum().backward()
        finally:
            ops.set_backend(before)
        trained = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {"logits": logits.detach(), **trained}

    found = run("cuda", torch.float32)
    assert {"add_norm_forward", "conv_backward", "pack_prompters", "prompt_backward"} < set(
        gpu.launches
    )
    truth = run("reference", torch.float64)
    assert len(found) > 8
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert error(value, truth[name]) < 3e-5, name  # two blocks, each with the kernels' 1e-5
