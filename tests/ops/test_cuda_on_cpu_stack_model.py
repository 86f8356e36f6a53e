"""A whole model whose blocks run as one op, on a CPU: against the same model, its blocks called.

The kernels are emulated (cuda_on_cpu/__init__.py). Blocks that are called compute in float32 and
round, so that both agree to bfloat16 only.
"""

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from svp_peft import SVPConfig, VisionMamba, add_adapter, disable_adapter, ops, set_adapter
from svp_peft.hooks import PromptBlockInput
from svp_peft.ops.cuda.prompter_copies import Copies
from svp_peft.prompters import SVPAdapter
from svp_peft.vim import stack
from svp_peft.vim.block import Block, DropPath
from tests.ops.cuda_cases import error
from tests.ops.test_cuda_on_cpu_stack import on_cuda, small_vim  # noqa: F401

# of two computations in bfloat16, four blocks deep
TOLERANCE = 6e-2

pytestmark = pytest.mark.usefixtures("on_cuda")


def images(batch: int = 2) -> Tensor:
    torch.manual_seed(5)
    return torch.randn(batch, 3, 24, 24)


def logits_of(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    with torch.autocast("cpu", dtype):
        return model(x)


def loss_of(logits: Tensor) -> Tensor:
    torch.manual_seed(7)
    return (logits.double() * torch.randn(logits.shape).double()).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def called(model: nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    """The gradients of `run` where every block is called."""
    with mock.patch.object(stack, "run", return_value=None):
        run()
    return gradients(model)


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in expected.items():
        assert error(found[name], gradient) < TOLERANCE, name


def step(model: nn.Module) -> None:
    loss_of(logits_of(model, images())).backward()


def runs_as_one(model: nn.Module, x: Tensor | None = None) -> bool:
    once, found = stack.run, []

    def noted(*arguments: Any) -> Any:
        found.append(once(*arguments))
        return found[-1]

    with torch.no_grad(), mock.patch.object(stack, "run", noted):
        logits_of(model, images() if x is None else x)
    return found[0] is not None


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrise(model: VisionMamba) -> None:
    parametrize.register_parametrization(model.svp.cross[1], "weight", Doubled())
    parametrize.register_parametrization(model.svp.inner[2].down, "weight", Doubled())


def tie_inner(model: VisionMamba) -> None:
    model.svp.inner[3].up.bias = model.svp.inner[1].up.bias
    model.svp.inner[3].down = model.svp.inner[2].down


def tie_far_groups(model: VisionMamba) -> None:
    model.svp.cross[3].weight = model.svp.cross[1].weight


def tie_near_groups(model: VisionMamba) -> None:
    model.svp.cross[1].weight = model.svp.cross[0].weight
    model.svp.cross[1].bias = model.svp.cross[0].bias


def tie_cross_to_inner(model: VisionMamba) -> None:
    model.svp.inner[3].up.bias = model.svp.cross[1].bias


def train_scales_only(model: VisionMamba) -> None:
    model.svp.inner.requires_grad_(False)
    model.svp.cross.requires_grad_(False)


def train_one_prompter(model: VisionMamba) -> None:
    model.svp.requires_grad_(False)
    model.svp.inner[3].up.requires_grad_(True)


def train_the_class_token_only(model: VisionMamba) -> None:
    model.svp.requires_grad_(False)
    model.cls_token.requires_grad_(True)


CHANGES = [
    parametrise, tie_inner, tie_far_groups, tie_near_groups, tie_cross_to_inner,
    train_scales_only, train_one_prompter, train_the_class_token_only,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_gradients_are_those_of_the_blocks_called(change: Callable[[nn.Module], None]) -> None:
    group = 1 if change is tie_far_groups else 2
    model = small_vim(config=SVPConfig(cross_group_size=group, inner_bottleneck=8))
    change(model)
    assert runs_as_one(model)
    step(model)
    found = gradients(model)
    check(found, called(model, lambda: step(model)))


@pytest.mark.parametrize("layers", [[0, 2, 3], [1, 2, 3], [0], [3]], ids=str)
def test_blocks_without_a_prompt_change_no_gradient(layers: list[int]) -> None:
    model = small_vim(config=SVPConfig(layers=layers, cross_group_size=2, inner_bottleneck=8))
    assert runs_as_one(model)
    step(model)
    check(gradients(model), called(model, lambda: step(model)))


@pytest.mark.parametrize("group", [1, 3, 4])
def test_groups_of_any_size_add_up(group: int) -> None:
    model = small_vim(config=SVPConfig(cross_group_size=group, inner_bottleneck=8))
    step(model)
    check(gradients(model), called(model, lambda: step(model)))


def accumulate(model: nn.Module) -> None:
    step(model)
    loss_of(logits_of(model, images(3))).backward()


def keep_the_graph(model: nn.Module) -> None:
    loss = loss_of(logits_of(model, images()))
    loss.backward(retain_graph=True)
    loss.backward()


def two_graphs(model: nn.Module) -> None:
    losses = [loss_of(logits_of(model, images(batch))) for batch in (1, 3)]
    losses[0].backward()
    losses[1].backward()


def on_the_cpu(model: nn.Module) -> None:
    with torch.autograd.graph.save_on_cpu():
        step(model)


def recomputed(model: nn.Module, reentrant: bool) -> None:
    x = images().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits = checkpoint(model, x, use_reentrant=reentrant)
    loss_of(logits).backward()


def watched(model: nn.Module) -> None:
    with torch.autograd.detect_anomaly(check_nan=True):
        step(model)


def in_evaluation_first(model: nn.Module) -> None:
    with torch.inference_mode():
        logits_of(model, images())
    step(model)


@pytest.mark.parametrize(
    "run",
    [
        accumulate, keep_the_graph, two_graphs, on_the_cpu, watched, in_evaluation_first,
        lambda model: recomputed(model, True), lambda model: recomputed(model, False),
    ],
    ids=[
        "accumulate", "retain_graph", "two graphs", "save_on_cpu", "anomaly", "inference first",
        "reentrant", "not reentrant",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("keep", [0, 1 << 40], ids=["recompute", "keep"])
def test_ways_to_use_the_graph(run, keep, monkeypatch) -> None:
    monkeypatch.setattr("svp_peft.ops.stack_op.KEEP_PRE_ACTIVATIONS", keep)
    monkeypatch.setitem(ops.mixer_op._KEEP_EVERYTHING, "cpu", keep)
    model = small_vim()
    run(model)  # the very first pass of this model
    found = gradients(model)
    check(found, called(model, lambda: run(model)))


def test_some_gradients_or_those_of_one_output() -> None:
    model = small_vim()
    asked = [model.svp.inner[2].down.weight, model.svp.alpha]
    found = torch.autograd.grad(loss_of(logits_of(model, images())), asked)
    with mock.patch.object(stack, "run", return_value=None):
        expected = torch.autograd.grad(loss_of(logits_of(model, images())), asked)
    for mine, true in zip(found, expected, strict=True):
        assert error(mine, true) < TOLERANCE
    with torch.autocast("cpu", torch.bfloat16):
        tokens, _ = model._embed(images(), False)
        for output in (0, 1):
            mine = torch.autograd.grad(
                loss_of(model._run_blocks(tokens, False, None)[output]), asked
            )
            with mock.patch.object(stack, "run", return_value=None):
                out = model._run_blocks(tokens, False, None)[output]
            for one, other in zip(mine, torch.autograd.grad(loss_of(out), asked), strict=True):
                assert error(one, other) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_backward_pass_inside_an_autocast_computes_in_its_own_dtypes(dtype) -> None:
    model = small_vim()
    step(model)
    expected = gradients(model)
    loss = loss_of(logits_of(model, images()))
    with torch.autocast("cpu", dtype):
        loss.backward()
    found = gradients(model)
    # of the stack alone: the same bits; the first block is not in it
    for name in ("inner.3.down.bias", "inner.2.up.weight", "inner.1.down.weight"):
        (key,) = [key for key in found if key.endswith(name)]
        assert error(found[key], expected[key]) < (1e-2 if dtype == torch.float16 else 1e-6)


def test_nothing_outlives_its_pass() -> None:
    model = small_vim()
    step(model)
    kept: list[weakref.ref[Tensor]] = []
    once = stack.run

    def noted(model: Any, hidden: Tensor, *rest: Any) -> Any:
        kept.append(weakref.ref(hidden))
        found = once(model, hidden, *rest)
        kept.extend(weakref.ref(t) for t in found)
        return found

    gc.disable()
    try:
        with mock.patch.object(stack, "run", noted):
            logits = logits_of(model, images())
            assert any(ref() is not None for ref in kept)
            del logits
            assert len(kept) == 3
            assert all(ref() is None for ref in kept)
            logits = logits_of(model, images())
            loss_of(logits).backward()  # the graph stays, what it saved does not
            assert kept[3]() is None
    finally:
        gc.enable()


def test_prepared_copies_keep_no_weights_and_go_with_the_device() -> None:
    model = small_vim()
    step(model)
    cache = model.layers[1].mixer._frozen.stack
    assert cache.prepared
    old = weakref.ref(model.svp.inner[2].down.weight.untyped_storage())
    model.svp.inner[2].down.weight.data = torch.zeros(8, 16)
    gc.collect()
    assert old() is None
    model.double()
    assert model.layers[1].mixer._frozen.stack.prepared is None


def test_gradients_do_not_hold_on_to_each_other() -> None:
    model = small_vim()
    step(model)
    largest = max(p.numel() for p in model.svp.inner.parameters()) * 4
    for name, gradient in gradients(model).items():
        if ".inner." in name:
            assert gradient.untyped_storage().nbytes() <= 3 * largest, name


def test_copies_are_told_apart_by_shape_where_addresses_are_equal() -> None:
    block = [torch.zeros(16, 16), torch.zeros(16), torch.zeros(16, 16), torch.zeros(16)]
    block += [torch.zeros(16, 16), torch.zeros(16)]
    copies = Copies([block], torch.bfloat16)
    smaller = [*block[:2], block[2][:8], block[3][:8], block[4].view(-1)[:128].view(16, 8)]
    smaller.append(block[5])
    assert copies.is_for([block], torch.bfloat16)
    assert not copies.is_for([smaller], torch.bfloat16)


def test_more_blocks_than_one_launch_takes(on_cuda) -> None:  # noqa: F811
    sizes = [(16, 16), (16,), (8, 16), (8,), (16, 8), (16,)]
    counts = [math.prod(size) for size in sizes]
    blocks = [
        [part.view(size) for part, size in zip(flat.split(counts), sizes, strict=True)]
        for flat in torch.randn(70, sum(counts))
    ]
    copies = Copies(blocks, torch.bfloat16)
    on_cuda.launches.clear()
    packed = copies.renewed()
    assert on_cuda.launches.count("pack_prompters") == 2
    for (cross, cross_bias, down, down_bias, up, up_bias), found in zip(
        blocks, packed, strict=True
    ):
        assert torch.equal(found.joint, torch.cat([cross, down]).bfloat16())
        assert torch.equal(found.joint_bias, torch.cat([cross_bias, down_bias]).bfloat16())
        assert torch.equal(found.up, up.bfloat16())
        assert torch.equal(found.up_bias, up_bias.bfloat16())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda inner: setattr(inner, "up", nn.Linear(16, 16)),
        lambda inner: setattr(inner.down, "bias", nn.Parameter(torch.zeros(16))),
        lambda inner: inner.down.to("meta"),
    ],
    ids=["up", "bias", "device"],
)
def test_weights_that_do_not_fit_are_an_error_as_where_blocks_are_called(spoil) -> None:
    model = small_vim()
    step(model)
    spoil(model.svp.inner[2])
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        logits_of(model, images())


def test_rows_of_scales_that_are_missing_are_an_error() -> None:
    model = small_vim()
    model.svp.adapter.beta = nn.Parameter(torch.ones(3, 16))
    with pytest.raises(IndexError):
        logits_of(model, images())


def test_norms_of_several_kinds_are_called() -> None:
    model = small_vim(rms_norm=False)
    assert runs_as_one(model)
    model.layers[2].norm.bias.data = model.layers[2].norm.bias.data.bfloat16()
    assert not runs_as_one(model)


def test_a_trained_norm_is_seen_where_it_is_no_parameter() -> None:
    model = small_vim()
    block = model.layers[2]
    x = torch.randn(1, 5, 16).bfloat16()
    assert stack._frozen(block, x) is not None
    weight = block.norm.weight.detach().requires_grad_()
    del block.norm._parameters["weight"]  # as sharded models do
    block.norm.weight = weight
    assert stack._frozen(block, x) is None


def test_whoever_replaces_or_extends_a_class_is_called(monkeypatch) -> None:
    class MyAdapter(SVPAdapter):
        pass

    class MyHook(PromptBlockInput):
        pass

    class MyState(type(small_vim().svp)):  # type: ignore[misc]
        pass

    model = small_vim()
    assert runs_as_one(model)
    for owner, kind in ((model.svp.adapter, MyAdapter), (model.svp, MyState)):
        before = type(owner)
        owner.__class__ = kind
        assert not runs_as_one(model)
        owner.__class__ = before
        assert runs_as_one(model)
    hooks = model.layers[2]._forward_pre_hooks
    (key,) = hooks
    hook = hooks[key]
    hooks[key] = MyHook(**vars(hook))
    assert not runs_as_one(model)
    with disable_adapter(model):
        assert not runs_as_one(model)
    hooks[key] = hook
    forward = Block.forward
    with monkeypatch.context() as patch:
        patch.setattr(Block, "forward", lambda self, *a, **k: forward(self, *a, **k))
        assert not runs_as_one(model)
    model.layers[2]._compiled_call_impl = model.layers[2]._call_impl
    assert not runs_as_one(model)
    model.layers[2]._compiled_call_impl = None
    assert runs_as_one(model)


def test_adapters_that_come_and_go_are_told_apart() -> None:
    model = small_vim()
    configs = {
        "wide": SVPConfig(cross_group_size=1, inner_bottleneck=16),
        "few": SVPConfig(cross_group_size=2, inner_bottleneck=8, layers=[1, 3]),
        "other": SVPConfig(cross_group_size=2, inner_bottleneck=8),
    }
    for name, config in configs.items():
        add_adapter(model, name, config)
        set_adapter(model, name)
        with torch.no_grad():
            model.svp.alpha.normal_()
            model.svp.beta.normal_()
    seen = []
    for name in ["default", *configs] * 2:
        set_adapter(model, name)
        with torch.no_grad():
            found = logits_of(model, images())
            with mock.patch.object(stack, "run", return_value=None):
                assert error(found, logits_of(model, images())) < TOLERANCE
        seen.append(found)
    assert all(torch.equal(a, b) for a, b in zip(seen[:4], seen[4:], strict=True))
    assert len({tuple(s.flatten().tolist()) for s in seen}) == 4
    with disable_adapter(model), torch.no_grad():
        found = logits_of(model, images())
        with mock.patch.object(stack, "run", return_value=None):
            assert error(found, logits_of(model, images())) < TOLERANCE


def test_rates_that_change_share_the_copies_and_a_graph_keeps_its_own(monkeypatch) -> None:
    model = small_vim()
    cache = model.layers[1].mixer._frozen.stack
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with torch.no_grad():
        logits_of(model, images())
        (first,) = cache.prepared
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        logits_of(model, images())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        for rate in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
            model.layers[2].drop_path = DropPath(rate)
            logits_of(model, images())
    assert len(cache.prepared) == 5
    assert first in cache.prepared  # the graph writes to its copies at every replay
    assert all(prepared.copies is first.copies for prepared in cache.prepared)


def test_a_hook_on_one_block_does_not_make_scales_be_taken_one_by_one() -> None:
    model = small_vim()
    model.layers[2].register_forward_hook(lambda *_: None)
    rows = model.svp.adapter._alpha_rows
    with (
        torch.autocast("cpu", torch.bfloat16),
        mock.patch.object(type(rows), "take", autospec=True, side_effect=type(rows).take) as take,
    ):
        model(images())
    assert take.call_count == 8
    seen: set[Any] = set()
    pending = [logits_of(model, images()).grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [parent for parent, _ in node.next_functions]
    names = [type(node).__name__ for node in seen]
    assert names.count("UnbindBackward0") == 2
    assert rows.prepared is None


def test_images_of_one_token_and_batches_of_none() -> None:
    model = small_vim(img_size=8, use_middle_cls_token=False, if_cls_token=False)
    x = torch.randn(3, 3, 8, 8)

    def run() -> None:
        loss_of(logits_of(model, x)).backward()

    assert runs_as_one(model, x)
    run()
    found = gradients(model)
    check(found, called(model, run))
    assert logits_of(model, x[:0]).shape == (0, 5)
