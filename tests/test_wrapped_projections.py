"""A projection that someone has wrapped is called, on every backend: peft's LoRA, hooks, the rest.

The fused mixer reads its submodules' weights; the authors' code does so always, and LoRA on it
changes nothing without a word. Tolerance: 3e-5 relative to the largest logit, float32 rounding in
two ways of computing the same; on a GPU too, with TF32 off.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from svp_peft import VisionMamba, ops
from svp_peft.ops.backends import kernels
from svp_peft.vim import mixer as mixer_module

PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj", "x_proj_b", "dt_proj_b")
CONVOLUTIONS = ("conv1d", "conv1d_b")


def _backend(name: str) -> object:
    device = torch.device("cuda" if name in ("cuda", "triton", "mamba_ssm") else "cpu")
    marks = [pytest.mark.gpu] if device.type == "cuda" else []
    # a backend of the GPU is looked at only where there is one
    if name != "reference" and (device.type == "cpu" or torch.cuda.is_available()):
        reason = kernels(name).unavailable(device)
        if reason is not None:
            marks.append(pytest.mark.skip(reason=reason))
    return pytest.param(name, marks=marks)


@pytest.fixture(params=[_backend(name) for name in ops.BACKENDS])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    ops.set_backend(request.param)
    yield "cpu" if request.param in ("reference", "cpu") else "cuda"
    ops.set_backend("auto")
    torch.backends.cuda.matmul.allow_tf32 = before


def vim(device: str = "cpu", **kwargs: object) -> VisionMamba:
    torch.manual_seed(0)
    sizes: dict[str, object] = {"img_size": 16, "patch_size": 4, "stride": 4, "num_classes": 5}
    sizes |= {"depth": 2, "embed_dim": 16, **kwargs}
    model = VisionMamba(**sizes)
    # at its initialisation a block adds a thousandth, and nothing done to it would be seen
    with torch.no_grad():
        for name, parameter in model.layers.named_parameters():
            if name.endswith("weight") and parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        model.head.weight.normal_(std=0.5)
    return model.to(device).eval()


def images(device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 16, 16, generator=generator).to(device)


def assert_same(found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5 * scale)


def assert_different(found: Tensor, other: Tensor) -> None:
    assert (found - other).abs().max() > 1e-3 * other.abs().max()


def with_lora(model: nn.Module, *targets: str, **options: object) -> nn.Module:
    peft = pytest.importorskip("peft")
    # peft wants the rank of a grouped convolution to be a multiple of its groups
    ranks = {name: 32 for name in targets if name in CONVOLUTIONS}
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=list(targets), rank_pattern=ranks, **options
    )
    return peft.get_peft_model(model, config)


def lora_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def randomise(parameters: dict[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(std=0.3)


@pytest.mark.parametrize("target", PROJECTIONS)
def test_lora_on_one_projection_is_the_model_with_merged_weights(device: str, target: str) -> None:
    x = images(device)
    base = vim(device)
    expected = base(x)
    model = with_lora(copy.deepcopy(base), target)
    assert_same(model(x), expected)  # lora_B starts at zero
    randomise(lora_tensors(model))
    adapted = model(x)
    assert_different(adapted, expected)
    merged = model.merge_and_unload()
    assert all(block.mixer._is_bare() for block in merged.layers)
    assert_same(merged(x), adapted)


@pytest.mark.parametrize("target", CONVOLUTIONS)
def test_lora_on_a_convolution_changes_what_the_reference_says(device: str, target: str) -> None:
    # peft does not merge into a grouped convolution
    x = images(device)
    model = with_lora(vim(device), target)
    before = model(x)
    randomise(lora_tensors(model))
    adapted = model(x)
    assert_different(adapted, before)
    ops.set_backend("reference")
    assert_same(model(x), adapted)


def test_lora_on_every_projection_trains(device: str) -> None:
    x, labels = images(device), torch.tensor([1, 3], device=device)
    model = with_lora(vim(device), *PROJECTIONS, *CONVOLUTIONS)
    adapters = lora_tensors(model)
    assert len(adapters) == 2 * 2 * (len(PROJECTIONS) + len(CONVOLUTIONS))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(adapters.values(), lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(x), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in model.named_parameters():
        if name in adapters:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
            assert not torch.equal(parameter, before[name]), name
        else:
            assert torch.equal(parameter, before[name]), name


def test_lora_has_the_gradients_of_the_reference(device: str) -> None:
    model = with_lora(vim(device), *PROJECTIONS)
    randomise(lora_tensors(model))

    def gradients() -> list[Tensor]:
        loss = model(images(device)).square().sum()
        return list(torch.autograd.grad(loss, list(lora_tensors(model).values())))

    found = gradients()
    ops.set_backend("reference")
    for gradient, expected in zip(found, gradients(), strict=True):
        # norm-wise: single elements can be sums that cancel
        assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_lora_can_be_switched_off_and_on(device: str) -> None:
    x = images(device)
    base = vim(device)
    expected = base(x)
    model = with_lora(base, *PROJECTIONS)
    randomise(lora_tensors(model))
    adapted = model(x)
    with model.disable_adapter():
        assert_same(model(x), expected)
    assert torch.equal(model(x), adapted)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}], ids=str)
def test_variants_of_lora_are_called_too(device: str, options: dict[str, bool]) -> None:
    x = images(device)
    model = with_lora(vim(device), "in_proj", "out_proj", **options)
    before = model(x)
    randomise(lora_tensors(model))
    adapted = model(x)
    assert_different(adapted, before)
    assert_same(model.merge_and_unload()(x), adapted)


@pytest.mark.parametrize("kind", ["none", "v1"])
def test_lora_reaches_the_other_kinds_of_mixers(device: str, kind: str) -> None:
    x = images(device)
    base = vim(device, bimamba_type=kind)
    expected = base(x)
    model = with_lora(base, "in_proj", "x_proj", "dt_proj", "out_proj")
    randomise(lora_tensors(model))
    adapted = model(x)
    assert_different(adapted, expected)
    assert_same(model.merge_and_unload()(x), adapted)


@pytest.mark.parametrize("path", [*PROJECTIONS, *CONVOLUTIONS])
def test_hooks_fire_once_and_change_what_they_return(device: str, path: str) -> None:
    x = images(device)
    model = vim(device)
    expected = model(x)
    module = model.layers[1].mixer.get_submodule(path)
    seen: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_: seen.append("before")),
        module.register_forward_hook(lambda *_: seen.append("after")),
    ]
    assert_same(model(x), expected)
    assert seen == ["before", "after"]
    handles.append(module.register_forward_hook(lambda _, __, out: 1.5 * out))
    assert_different(model(x), expected)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("path", [*PROJECTIONS, *CONVOLUTIONS])
def test_backward_hooks_fire(device: str, path: str) -> None:
    model = vim(device)
    norms: list[float] = []
    model.layers[0].mixer.get_submodule(path).register_full_backward_hook(
        lambda _, __, grads: norms.append(grads[0].norm().item())
    )
    model(images(device)).sum().backward()
    assert len(norms) == 1
    assert norms[0] > 0


def test_a_hook_on_all_modules_of_the_process_sees_the_projections(device: str) -> None:
    model = vim(device)
    expected = model(images(device))
    called: set[nn.Module] = set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, _, __: called.add(m))
    try:
        assert_same(model(images(device)), expected)
    finally:
        handle.remove()
    for block in model.layers:
        for path in (*PROJECTIONS, *CONVOLUTIONS):
            assert block.mixer.get_submodule(path) in called, path


@pytest.mark.parametrize("path", [*PROJECTIONS, *CONVOLUTIONS])
def test_a_parametrised_weight_is_used_and_trained(device: str, path: str) -> None:
    x = images(device)
    model = vim(device)
    expected = model(x)
    module = model.layers[0].mixer.get_submodule(path)
    parametrizations.weight_norm(module)
    assert_same(model(x), expected)
    with torch.no_grad():
        module.parametrizations.weight.original0.mul_(3.0)  # the norms
    assert_different(model(x), expected)
    model(x).square().sum().backward()
    assert module.parametrizations.weight.original0.grad.abs().max() > 0


@pytest.mark.parametrize("path", ["in_proj", "x_proj", "conv1d_b"])
def test_pruned_weights_are_used_and_their_masks_hold(device: str, path: str) -> None:
    x = images(device)
    model = vim(device)
    expected = model(x)
    module = model.layers[0].mixer.get_submodule(path)
    prune.random_unstructured(module, "weight", amount=0.5)
    pruned = model(x)
    assert_different(pruned, expected)
    module.weight_orig.grad = None
    pruned.sum().backward()
    assert not module.weight_orig.grad[module.weight_mask == 0].any()
    prune.remove(module, "weight")
    assert_same(model(x), pruned)


def test_a_replaced_forward_is_called(device: str) -> None:
    model = vim(device)
    projection = model.layers[0].mixer.in_proj
    expected = model(images(device))
    original = projection.forward
    projection.forward = lambda x: 1.5 * original(x)
    assert_different(model(images(device)), expected)


def test_one_wrapped_block_leaves_the_others_fused(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vim(device, depth=3)
    fused = []
    original = ops.mixer
    monkeypatch.setattr(
        mixer_module.ops, "mixer", lambda *a, **k: fused.append(1) or original(*a, **k)
    )
    model.layers[1].mixer.dt_proj.register_forward_hook(lambda *_: None)
    model(images(device))
    assert len(fused) == 2


def test_lora_and_svp_train_together(device: str) -> None:
    import svp_peft as sp

    x = images(device)
    model = vim(device)
    sp.apply_svp(model, sp.SVPConfig(inner_bottleneck=4, cross_group_size=2))
    model = with_lora(model, "in_proj", "out_proj")
    trained = lora_tensors(model)
    trained |= {n: p.requires_grad_() for n, p in model.named_parameters() if n.endswith("alpha")}
    assert any("svp" in name for name in trained)
    randomise(trained)
    model(x).square().sum().backward()
    for name, parameter in trained.items():
        assert parameter.grad.abs().max() > 0, name
