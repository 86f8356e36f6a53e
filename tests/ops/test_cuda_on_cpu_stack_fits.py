"""What the stack of blocks as one op notices, refuses and lets go; on a CPU, kernels emulated."""

import gc
import io
import math
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from svp_peft import SVPConfig, add_adapter, disable_adapter, ops, set_adapter
from svp_peft.hooks import PromptBlockInput
from svp_peft.ops.cuda.prompter_copies import Copies
from svp_peft.prompters import SVPAdapter
from svp_peft.vim import stack
from svp_peft.vim.block import Block, DropPath
from tests.ops.cuda_cases import error
from tests.ops.stack_cases import (
    TOLERANCE,
    gradients,
    images,
    logits_of,
    loss_of,
    runs_as_one,
    step,
)
from tests.ops.test_cuda_on_cpu_stack import on_cuda, small_vim  # noqa: F401

pytestmark = pytest.mark.usefixtures("on_cuda")


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


def test_a_saved_model_has_nothing_prepared() -> None:
    model = small_vim()
    step(model)
    expected = gradients(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.layers[1].mixer._frozen.stack.prepared is None
    step(loaded)
    found = gradients(loaded)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_pass_inside_another_one_of_the_same_model_changes_nothing() -> None:
    # as with two threads, which the emulator does not take
    model = small_vim()
    x, other = images(1), images(3)
    loss_of(logits_of(model, x)).backward()
    expected = gradients(model)
    loss_of(logits_of(model, other)).backward()
    expected_of_other = gradients(model)
    prepared = model.layers[2].mixer._frozen.prepared
    once, inside = prepared.forward, []

    def interrupted(normed: Tensor, keep: int) -> Any:
        if not inside:
            inside.append(None)
            model.layers[1].mixer._frozen.stack.prepared = None
            with torch.enable_grad():
                inside.append(logits_of(model, other))
        return once(normed, keep)

    with mock.patch.object(prepared, "forward", interrupted):
        logits = logits_of(model, x)
    loss_of(logits).backward()
    found = gradients(model)
    loss_of(inside[1]).backward()
    for mine, true in ((found, expected), (gradients(model), expected_of_other)):
        assert all(torch.equal(mine[name], gradient) for name, gradient in true.items())


def test_copies_made_for_several_devices_are_called() -> None:
    model = small_vim()
    step(model)
    twin = model._replicate_for_data_parallel()
    twin._modules = dict(model._modules)
    twin.layers = nn.ModuleList(b._replicate_for_data_parallel() for b in model.layers)
    for replica in twin.layers:
        replica._is_replica = True
    x = torch.randn(2, 5, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert stack.run(model, x, x.float(), None) is not None
        assert stack.run(twin, x, x.float(), None) is None


@pytest.mark.parametrize("length", [5, 600])
def test_prepared_launches_hold_no_activations(length: int) -> None:
    model = small_vim()
    mixer = model.layers[1].mixer
    x = torch.randn(1, length, 16).bfloat16()
    prepared = ops.mixer_op.prepared_mixer(
        mixer._frozen, mixer.frozen_weights(), torch.bfloat16, mixer._scale
    )
    gc.collect()
    before = {id(t) for t in gc.get_objects() if issubclass(type(t), Tensor)}
    prepared.forward(x, 0)
    gc.collect()
    fresh = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and id(t) not in before]
    assert all(t.numel() < length * 16 for t in fresh if t is not x)
