"""A whole model whose blocks run as one op, on a CPU: against the same model, its blocks called.

The kernels are emulated (cuda_on_cpu/__init__.py). Blocks that are called compute in float32 and
round, so that both agree to bfloat16 only.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from svp_peft import SVPConfig, VisionMamba, ops
from svp_peft.vim import stack
from svp_peft.vim.block import DropPath
from tests.ops.cuda_cases import error
from tests.ops.stack_cases import (
    TOLERANCE,
    called,
    check,
    gradients,
    images,
    logits_of,
    loss_of,
    runs_as_one,
    step,
)
from tests.ops.test_cuda_on_cpu_stack import on_cuda, small_vim  # noqa: F401

pytestmark = pytest.mark.usefixtures("on_cuda")


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


def test_gradients_where_images_are_dropped(monkeypatch) -> None:
    model = small_vim()
    rates = (0.0, 0.5, 1.0)
    for block, rate in zip(model.layers[1:], rates, strict=True):
        block.drop_path = DropPath(rate)
    masks = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]]).float()
    monkeypatch.setattr(torch, "bernoulli", lambda stays: masks.clone())

    def run() -> None:
        loss_of(logits_of(model, images(3))).backward()

    run()
    found = gradients(model)

    def dropped(self: DropPath, x: Tensor) -> Tensor:
        kept = 1 - self.drop_prob or 1.0
        return x * (masks[rates.index(self.drop_prob)] / kept).to(x.dtype).view(-1, 1, 1)

    monkeypatch.setattr(DropPath, "forward", dropped)
    expected = called(model, run)
    for name in list(expected):
        if ".inner.3." in name:  # of a block whose prompted tokens are all dropped
            assert not expected.pop(name).any()
            assert not found.pop(name).any()
    check(found, expected)


def test_functional_calls_take_the_given_weights() -> None:
    model = small_vim()
    step(model)
    gradients(model)
    name = "svp.adapters.default.inner.2.down.weight"
    given = {name: torch.randn(8, 16, requires_grad=True)}
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(torch.func.functional_call(model, given, (images(),)))
        found = torch.autograd.grad(loss, [given[name]])[0]
        with mock.patch.object(stack, "run", return_value=None):
            loss = loss_of(torch.func.functional_call(model, given, (images(),)))
            expected = torch.autograd.grad(loss, [given[name]])[0]
    assert error(found, expected) < TOLERANCE
