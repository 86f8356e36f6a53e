"""The ops and the models under torch.compile, torch.export and torch.func, and recomputed.

Compilers are stood in for by aot_eager: dynamo, fake tensors and the joint graph of forward and
backward as for any compiled model, without a minute of C++ compiler. Tolerances: 1e-5 relative
to the largest element, since a traced graph may sum in another order.
"""

import importlib
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, library, nn
from torch.utils.checkpoint import checkpoint

import svp_peft as sp
from svp_peft import ops
from svp_peft.ops import cpu, mixer_op, norm_op, scan_op
from svp_peft.ops.mixer_passes import pack
from svp_peft.ops.types import MixerWeights
from tests.ops.cuda_cases import map_tensors, scan_case

recurrence = importlib.import_module("svp_peft.ops.reference.scan")

_REASON = cpu.unavailable(torch.device("cpu"))
needs_cpu_kernels = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu_kernels)]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    ops.set_backend("auto")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    ops.set_backend(request.param)
    return str(request.param)


def compiled(function: Callable[..., object], **options: object) -> Callable[..., object]:
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def assert_close(found: Tensor, expected: Tensor) -> None:
    scale = max(expected.abs().max().item(), 1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)


def vim(**kwargs: object) -> sp.VisionMamba:
    torch.manual_seed(0)
    sizes: dict[str, object] = {"img_size": 16, "patch_size": 4, "stride": 4, "num_classes": 5}
    sizes |= {"depth": 2, "embed_dim": 16, **kwargs}
    return sp.VisionMamba(**sizes).eval()


def patched(**kwargs: object) -> nn.Module:
    model = sp.apply_svp(vim(), sp.SVPConfig(inner_bottleneck=4, cross_group_size=2, **kwargs))
    with torch.no_grad():
        model.svp.alpha.normal_(std=0.5)
        model.svp.beta.normal_(std=0.5)
    return model


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, run: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(run(x).square().sum(), list(trained(model).values())))


# the ops


def leaves(value: object) -> list:
    if value is None:
        return []
    tensors = value if isinstance(value, tuple) else (value,)
    return [t.detach().clone().requires_grad_() for t in tensors]


def mixer_weights(convs: int, scans: int, *, bias: bool, frozen: bool) -> MixerWeights:
    def several(count: int, *shape: int) -> tuple[Tensor, ...]:
        return tuple((0.4 * torch.randn(*shape)).requires_grad_(not frozen) for _ in range(count))

    return MixerWeights(
        in_proj_weight=several(1, 16, 4)[0],
        in_proj_bias=several(1, 16)[0] if bias else None,
        conv_weight=several(convs, 8, 4),
        conv_bias=several(convs, 8) if bias else None,
        x_proj_weight=several(convs, 3 + 8, 8),
        dt_weight=several(convs, 8, 3),
        dt_bias=several(convs, 8),
        A_log=several(scans, 8, 4),
        D=several(convs, 8),
        out_proj_weight=several(1, 4, 8)[0],
        out_proj_bias=several(1, 4)[0] if bias else None,
    )


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("convs", "scans", "frozen", "keep"),
    [(1, 1, False, 2), (1, 2, False, 1), (2, 2, False, 2), (2, 2, True, 1)],
)
def test_the_mixer_is_a_well_formed_op(convs: int, scans: int, frozen: bool, keep: int) -> None:
    weights = mixer_weights(convs, scans, bias=not frozen, frozen=frozen)
    hidden = torch.randn(2, 5, 4, requires_grad=True)
    arguments = (hidden, *pack(weights), 0.5, torch.float32, "cpu", keep)
    library.opcheck(mixer_op._mixer_op, arguments)


@needs_cpu_kernels
def test_the_mixer_of_inference_is_a_well_formed_op() -> None:
    weights = mixer_weights(2, 2, bias=True, frozen=True)
    arguments = (torch.randn(2, 5, 4), *pack(weights), 0.5, torch.float32, "cpu", 0)
    library.opcheck(mixer_op._mixer_op, arguments)


@needs_cpu_kernels
@pytest.mark.parametrize(
    "options",
    [{}, {"directions": 1}, {"gate": False, "skip": False, "bias": False, "low_rank": False}],
    ids=str,
)
def test_the_scan_is_a_well_formed_op(options: dict) -> None:
    case = scan_case(2, 5, 6, 4, 3, **options)
    groups = [leaves(value) for value in case.arguments]
    groups[4] = groups[4][0] if groups[4] else None
    settings = case.options
    library.opcheck(
        scan_op._scan,
        (
            *groups, list(settings["reverse"]), settings["softplus"], settings["scale"],
            settings["A_is_log"], "cpu",
        ),
    )  # fmt: skip


@needs_cpu_kernels
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_convolution_is_a_well_formed_op(has_bias: bool) -> None:
    x = torch.randn(2, 5, 6, requires_grad=True)
    weight = leaves((torch.randn(6, 4), torch.randn(6, 4)))
    bias = leaves((torch.randn(6), torch.randn(6))) if has_bias else []
    library.opcheck(scan_op._conv_silu, (x, weight, bias, [False, True], "cpu"))


@needs_cpu_kernels
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
def test_the_norm_is_a_well_formed_op(has_residual: bool, rms: bool) -> None:
    hidden, residual = leaves((torch.randn(2, 5, 4), torch.randn(2, 5, 4)))
    weight, bias = leaves((torch.randn(4), torch.randn(4)))
    library.opcheck(
        norm_op._add_norm_op,
        (
            hidden, residual if has_residual else None, weight, None if rms else bias,
            1e-5, rms, torch.float32, "cpu",
        ),
    )  # fmt: skip


def test_the_recurrence_of_the_reference_is_a_well_formed_op() -> None:
    u, delta = torch.randn(2, 2, 5, 6), torch.rand(2, 2, 5, 6)
    A, B, C = -torch.rand(2, 6, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    library.opcheck(recurrence._recurrence, tuple(leaves((u, delta, A, B, C))))


# torch.compile


def test_selective_scan_trains_in_one_graph(backend: str) -> None:
    u, delta = torch.randn(2, 6, 5), torch.rand(2, 6, 5)
    A, B, C = -torch.rand(6, 4), torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    D, z, bias = torch.randn(6), torch.randn(2, 6, 5), torch.rand(6)
    inputs = leaves((u, delta, A, B, C, D, z, bias))
    run = compiled(ops.selective_scan)
    found = torch.autograd.grad(run(*inputs).square().sum(), inputs)
    expected = torch.autograd.grad(ops.selective_scan(*inputs).square().sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


def test_a_patched_model_trains_in_one_graph(backend: str) -> None:
    model = patched()
    run = compiled(model)
    assert_close(run(images()), model(images()))
    names = trained(model)
    assert not any("mixer" in name for name in names)
    found = gradients(model, run, images())
    for name, a, b in zip(names, found, gradients(model, model, images()), strict=True):
        assert_close(a, b), name


@pytest.mark.parametrize("kind", ["none", "v1"])
def test_the_other_kinds_of_mixers_train_in_one_graph(kind: str) -> None:
    model = vim(bimamba_type=kind)
    found = gradients(model, compiled(model), images())
    for a, b in zip(found, gradients(model, model, images()), strict=True):
        assert_close(a, b)


def test_training_mode_with_drop_path_and_dropout_is_one_graph() -> None:
    model = sp.apply_svp(
        vim(drop_path_rate=0.3),
        sp.SVPConfig(inner_bottleneck=4, cross_group_size=2, dropout=0.2),
    ).train()
    loss = compiled(model)(images()).square().sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert model.svp.alpha.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_autocast_is_one_graph(name: str) -> None:
    ops.set_backend(name)
    model = patched()
    run = compiled(model)

    def logits(forward: Callable[..., Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(images()).float()

    found, expected = logits(run), logits(model)
    # bfloat16 keeps eight bits, and a graph may round in other places
    assert (found - expected).norm() < 0.03 * expected.norm()
    logits(run).sum().backward()
    assert model.svp.beta.grad.abs().max() > 0


def test_a_wrapped_projection_trains_in_one_graph(backend: str) -> None:
    peft = pytest.importorskip("peft")
    targets = ["in_proj", "x_proj", "dt_proj", "out_proj"]
    model = peft.get_peft_model(vim(), peft.LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.normal_(std=0.3)
    found = gradients(model, compiled(model), images())
    for a, b in zip(found, gradients(model, model, images()), strict=True):
        assert_close(a, b)


def test_what_was_traced_once_serves_every_batch_size() -> None:
    model = patched()
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(model, fullgraph=True, backend=count, dynamic=True)
    with torch.no_grad():
        assert_close(run(images(2)), model(images(2)))
        traced = len(graphs)
        for batch in (3, 5):
            assert_close(run(images(batch)), model(images(batch)))
    assert len(graphs) == traced


def test_a_compiled_model_follows_its_weights() -> None:
    # frozen weights are converted once and remembered: a graph must not remember them
    model = patched()
    run = compiled(model)
    with torch.no_grad():
        first = run(images())
        model.layers[0].mixer.in_proj.weight.mul_(1.5)
        changed = run(images())
        assert (changed - first).abs().max() > 0
        assert_close(changed, model(images()))


# torch.export and torch.func


@pytest.mark.parametrize("grad", [True, False])
def test_a_patched_model_exports_with_any_batch_size(grad: bool) -> None:
    model = patched()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (images(),), dynamic_shapes={"x": {0: batch}})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (2, 7):
        assert_close(loaded(images(size)), model(images(size)))


@needs_cpu_kernels
def test_a_model_that_trades_memory_for_time_exports_with_any_batch_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # as on a GPU, where what is kept depends on the size of the batch
    monkeypatch.setitem(mixer_op._KEEP_EVERYTHING, "cpu", 5000)
    model = patched()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (images(),), dynamic_shapes={"x": {0: batch}})
    for size in (2, 7):
        assert_close(program.module()(images(size)), model(images(size)))


def test_functional_call_gives_the_gradients_of_other_parameters() -> None:
    model = patched()
    values = {k: v.detach().clone() for k, v in model.state_dict(keep_vars=True).items()}
    changed = {k: (1.1 * v).requires_grad_() for k, v in values.items() if v.is_floating_point()}
    loss = torch.func.functional_call(model, changed, (images(),)).square().sum()
    found = torch.autograd.grad(loss, list(changed.values()), allow_unused=True)
    twin = patched()
    twin.load_state_dict({k: v.detach() for k, v in changed.items()})
    parameters = dict(twin.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_()
    twin(images()).square().sum().backward()
    for name, gradient in zip(changed, found, strict=True):
        if name in parameters and parameters[name].grad is not None:
            assert_close(gradient, parameters[name].grad)


# recomputation


@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_can_be_recomputed_in_the_backward_pass(
    backend: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patched()
    expected = gradients(model, model, images())
    original = type(model)._call

    def recomputed(self: nn.Module, block: nn.Module, *args: object) -> object:
        return checkpoint(lambda *a: original(self, block, *a), *args, use_reentrant=reentrant)

    monkeypatch.setattr(type(model), "_call", recomputed)
    # the reentrant form needs an input that wants a gradient, and does not know torch.autograd.grad
    model(images().requires_grad_(reentrant)).square().sum().backward()
    for parameter, gradient in zip(trained(model).values(), expected, strict=True):
        assert_close(parameter.grad, gradient)


def test_recomputation_works_inside_a_compiled_model() -> None:
    model = patched()

    def run(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    found = gradients(model, compiled(run), images())
    for a, b in zip(found, gradients(model, model, images()), strict=True):
        assert_close(a, b)


def test_the_helper_that_compares_can_fail() -> None:
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1.0, 1.001]), torch.tensor([1.0, 1.0]))
    assert map_tensors((torch.ones(1),), torch.neg)[0].item() == -1
