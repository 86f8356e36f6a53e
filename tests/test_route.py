import contextlib

import pytest
import torch
from torch import nn

from svp_peft import routing
from svp_peft.adapter_tensors import adapter_state
from svp_peft.adapters import (
    add_adapter,
    delete_adapter,
    disable_adapter,
    set_adapter,
)
from svp_peft.config import SVPConfig
from svp_peft.errors import AdapterNameError, InputError
from svp_peft.ops import backends
from svp_peft.patch import apply_svp
from svp_peft.routing import route
from tests import tiny
from tests.from_the_host import FromTheHost
from tests.lookalikes import VimLike

CLASSES = {"birds": 5, "cars": 3, "dogs": 7}
MIXED = ["cars", "birds", "__base__", "cars", "dogs", "birds", "__base__"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    config = SVPConfig(inner_bottleneck=4, cross_group_size=2)
    model = apply_svp(VimLike(num_classes=4).eval(), config, adapter_name="birds")
    add_adapter(model, "cars", SVPConfig(inner_bottleneck=2, simam_input=True), num_classes=3)
    add_adapter(model, "dogs", SVPConfig(layers=(1,)), num_classes=7)
    model.head = nn.Linear(16, 5)
    for name in CLASSES:
        set_adapter(model, name)
        with torch.no_grad():
            for tensor in adapter_state(model).values():
                tensor.normal_(std=0.3)
    return model


def alone(model: nn.Module, name: str, images: torch.Tensor) -> torch.Tensor:
    """Logits of `images` with one adapter for all of them."""
    if name == "__base__":
        with disable_adapter(model):
            return model(images)
    set_adapter(model, name)
    return model(images)


@pytest.mark.parametrize(
    "names",
    [
        MIXED,
        sorted(MIXED),
        ["cars"] * 7,
        ["__base__"] * 7,
        ["birds", "cars", "birds", "cars", "birds", "cars", "birds"],
    ],
)
def test_every_row_equals_its_adapter_alone(model, names):
    images = torch.randn(7, 3, 16, 16)
    expected = {name: alone(model, name, images) for name in set(names)}
    with route(model, names) as routed:
        logits = model(images)
        parts = routed.per_adapter(logits)
    widest = max(out.shape[1] for out in expected.values())
    assert logits.shape == (7, widest)
    for row, name in enumerate(names):
        classes = expected[name].shape[1]
        # matrix products of other batch sizes may round differently
        torch.testing.assert_close(logits[row, :classes], expected[name][row], rtol=1e-5, atol=1e-6)
        assert (logits[row, classes:] == float("-inf")).all()
    for name, rows in parts.items():
        own = [i for i, other in enumerate(names) if other == name]
        torch.testing.assert_close(rows, expected[name][own], rtol=1e-5, atol=1e-6)


def test_one_pass_through_the_backbone_serves_all_adapters(model):
    calls = []
    model.layers[0].register_forward_hook(lambda m, args, out: calls.append(args[0].shape[0]))
    with route(model, MIXED):
        model(torch.randn(7, 3, 16, 16))
    assert calls == [7]


def test_gradients_are_those_of_each_adapter_alone(model):
    images = torch.randn(4, 3, 16, 16)
    names = ["cars", "birds", "cars", "dogs"]
    for name in CLASSES:
        set_adapter(model, name)
        rows = [i for i, other in enumerate(names) if other == name]
        model(images[rows]).square().sum().backward()
    expected = {k: p.grad.clone() for k, p in trained(model).items()}
    model.zero_grad()
    with route(model, names) as routed:
        sum(part.square().sum() for part in routed.per_adapter(model(images)).values()).backward()
    for key, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=1e-5)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {k: p for k, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def test_cross_entropy_of_padded_logits_is_finite_and_trains(model):
    model.train()
    with route(model, ["cars", "dogs"]):
        loss = nn.functional.cross_entropy(model(torch.randn(2, 3, 16, 16)), torch.tensor([2, 6]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in trained(model).values())


def test_everything_is_as_before_after_the_context_even_after_an_exception(model):
    images = torch.randn(7, 3, 16, 16)
    set_adapter(model, "cars")
    before, hooks = model(images), len(model.head._forward_hooks)
    with contextlib.suppress(ZeroDivisionError), route(model, MIXED):
        model(images)
        raise ZeroDivisionError
    assert torch.equal(model(images), before)
    assert len(model.head._forward_hooks) == hooks


def test_wrong_names_and_lengths_are_errors_before_anything_runs(model):
    ran = []
    model.patch_embed.register_forward_hook(lambda *args: ran.append(1))
    with pytest.raises(AdapterNameError, match=r"'planes'.*\['birds', 'cars', 'dogs'\]"):
        route(model, ["birds", "planes"])
    with pytest.raises(AdapterNameError, match="3"):
        route(model, ["birds", 3])
    with pytest.raises(InputError, match="no adapter names"):
        route(model, [])
    for names in ("birds", None, 3):
        with pytest.raises(InputError, match="not a list of adapter names"):
            route(model, names)
    with route(model, ["birds"] * 3), pytest.raises(InputError, match=r"2 images .* 3 adapter"):
        model(torch.randn(2, 3, 16, 16))
    assert ran == []


def test_lifecycle_calls_are_refused_inside(model):
    with route(model, ["birds"]):
        for call in (set_adapter, delete_adapter):
            with pytest.raises(InputError, match="inside route"):
                call(model, "cars")


def test_an_adapter_with_other_modules_of_its_own_is_refused(model):
    add_adapter(model, "own", SVPConfig(modules_to_save=("head", "norm_f")))
    with pytest.raises(InputError, match=r"own copy of \['norm_f'\]"):
        route(model, ["own"])


def test_route_and_disable_nest_both_ways(model):
    images = torch.randn(2, 3, 16, 16)
    base = alone(model, "__base__", images)
    names = ["cars", "birds"]
    with route(model, names):
        expected = model(images)
        with disable_adapter(model):
            assert torch.equal(model(images), base)
        assert torch.equal(model(images), expected)
        with route(model, ["dogs", "dogs"]):
            assert model(images).shape == (2, 7)
        assert torch.equal(model(images), expected)
    with disable_adapter(model):
        with route(model, names):
            assert torch.equal(model(images), expected)
        assert torch.equal(model(images), base)


def test_one_context_may_be_entered_within_itself_and_again(model):
    images = torch.randn(7, 3, 16, 16)
    set_adapter(model, "cars")
    before, context = model(images), route(model, MIXED)
    with context:
        expected = model(images)
        with context, disable_adapter(model), context:
            assert torch.equal(model(images), expected)
            assert context.per_adapter(model(images))["cars"].shape == (2, 3)
        assert torch.equal(model(images), expected)
    assert torch.equal(model(images), before)
    with context:
        assert torch.equal(model(images), expected)
    assert torch.equal(model(images), before)
    assert not model.head._forward_hooks


@pytest.mark.parametrize("batched", [True, False])
def test_a_context_used_again_copies_nothing_from_the_host(batched, monkeypatch):
    """So that it can be captured as a CUDA graph after a call to warm up."""
    monkeypatch.setattr(routing, "_on_gpu", lambda x: batched)
    monkeypatch.setattr(backends, "_default", "reference")
    model = tiny.trained(name="birds")
    add_adapter(model, "cars", num_classes=3)
    images, context = torch.randn(4, 3, 16, 16), route(model, ["cars", "birds"] * 2)
    found = []
    for _ in range(2):
        with FromTheHost() as seen, context:
            model(images)
        found.append(seen.found)
    # the first call makes the indices that sort the batch
    assert found == [{"lift_fresh"}, set()]


def test_a_context_whose_adapter_has_gone_is_not_entered(model):
    context = route(model, ["dogs", "cars"])
    delete_adapter(model, "dogs", new_active="cars")
    with pytest.raises(AdapterNameError, match="'dogs'"), context:
        pass
    assert model.svp.routing is None
    assert model(torch.randn(3, 3, 16, 16)).shape == (3, 3)


def test_adapters_without_a_head_of_their_own_share_the_base_head():
    torch.manual_seed(1)
    config = SVPConfig(modules_to_save=(), inner_bottleneck=4)
    model = apply_svp(VimLike().eval(), config, adapter_name="a")
    add_adapter(model, "b")
    for name in ("a", "b"):
        nn.init.normal_(model.svp.adapters[name].alpha)
    images = torch.randn(2, 3, 16, 16)
    expected = torch.stack([alone(model, name, images)[i] for i, name in enumerate("ab")])
    with route(model, ["a", "b"]):
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)


def test_route_works_on_a_compiled_model_and_after_it(model):
    torch._dynamo.reset()
    images = torch.randn(2, 3, 16, 16)
    set_adapter(model, "cars")
    compiled = torch.compile(model, backend="eager")
    before = compiled(images)
    with route(model, ["dogs", "cars"]):
        torch.testing.assert_close(compiled(images), model(images))
        assert compiled(images).shape == (2, 7)
    torch.testing.assert_close(compiled(images), before)
