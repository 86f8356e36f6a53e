import contextlib
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from svp_peft import grouped, routing
from svp_peft.adapters import add_adapter, disable_adapter, set_adapter
from svp_peft.config import SVPConfig
from svp_peft.grouped import GroupedPrompts
from svp_peft.ops import backends
from svp_peft.prompters import SVPAdapter
from tests import tiny


def adapter(**fields) -> SVPAdapter:
    made = SVPAdapter(8, 4, SVPConfig(**{"inner_bottleneck": 3, **fields}))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def together(sizes) -> GroupedPrompts:
    """For adapters 0, 1, ..., whose rows stand one after the other."""
    rows = list(range(sum(sizes)))
    parts = torch.tensor(rows).split(list(sizes))
    return GroupedPrompts({str(k): part.tolist() for k, part in enumerate(parts)}, len(rows))


def can_group(adapters, sizes, block) -> bool:
    named = {str(k): adapter for k, adapter in enumerate(adapters)}
    return together(sizes).prompting(named, block) == tuple(named)


def prompt_grouped(parts, adapters, block, skip):
    sizes = [len(part) for part in parts]
    named = {str(k): adapter for k, adapter in enumerate(adapters)}
    out = together(sizes)(torch.cat(parts), named, tuple(named), block, skip)
    return out.split(sizes)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize("skip", [(), (3,), (0, 6)])
def test_each_part_equals_its_adapter_alone(sizes, skip):
    adapters = [adapter(cross_group_size=group) for group in (1, 2, 4)]
    parts = [torch.randn(size, 7, 8) for size in sizes]
    assert can_group(adapters, sizes, 2)
    prompted = prompt_grouped(parts, adapters, 2, skip)
    for part, own, result in zip(parts, adapters, prompted, strict=True):
        # batched products may round differently from single ones
        torch.testing.assert_close(result, own(part, 2, skip), rtol=1e-5, atol=1e-6)


def test_gradients_equal_those_of_each_adapter_alone():
    adapters = [adapter().double(), adapter().double()]
    parts = [torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    wanted = [*parts, *(p for own in adapters for p in own.parameters())]

    def gradients(outputs):
        loss = sum(out.square().sum() for out in outputs)
        return torch.autograd.grad(loss, wanted, allow_unused=True)

    alone = gradients([own(part, 1, (2,)) for own, part in zip(adapters, parts, strict=True)])
    together = gradients(prompt_grouped(parts, adapters, 1, (2,)))
    for one, other in zip(alone, together, strict=True):
        # other blocks' prompters are not used
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_stay_so_and_class_tokens_are_untouched(dtype):
    parts = [torch.randn(2, 5, 8).to(dtype) for _ in range(2)]
    adapters = [adapter(), adapter()]
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            prompted = prompt_grouped(parts, adapters, 0, (2,))
            alone = [own(part, 0, (2,)) for own, part in zip(adapters, parts, strict=True)]
        for part, result, expected in zip(parts, prompted, alone, strict=True):
            assert result.dtype == dtype
            assert torch.equal(result[:, 2], part[:, 2])
            # half precision keeps 8 or 11 bits of every product
            torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


def test_what_differs_in_more_than_values_is_not_grouped():
    plain = adapter()
    for other in (
        adapter(inner_bottleneck=2),
        adapter(use_cross=False),
        adapter(use_inner=False),
        adapter(layers=(0,)),
        adapter(dropout=0.5),
        adapter(cross_source="released", cross_group_size=2),
    ):
        assert not can_group([plain, other], (1, 1), 1)
    assert can_group([plain, adapter(dropout=0.5).eval()], (1, 1), 1)
    assert not can_group([plain], (4,), 1)
    # one large group and seven small ones would be padded to eight large ones
    assert not can_group([adapter() for _ in range(8)], (57, *[1] * 7), 1)


@pytest.fixture
def served(monkeypatch) -> nn.Module:
    """Two adapters alike, "c" that prompts blocks 1 and 2 alone; grouped as on a GPU."""
    torch.manual_seed(1)
    model = tiny.trained(name="a")
    for name, layers in (("b", None), ("c", (1, 2))):
        add_adapter(model, name, dataclasses.replace(tiny.CONFIG, layers=layers))
        tiny.randomise(model, name, seed=ord(name))
    monkeypatch.setattr(routing, "_on_gpu", lambda x: True)
    monkeypatch.setattr(backends, "_default", "reference")
    return model


MIXED = ["c", "a", "__base__", "b", "a", "c"]


def alone(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    found = torch.empty(len(MIXED), 5)
    for row, name in enumerate(MIXED):
        context = disable_adapter(model) if name == "__base__" else contextlib.nullcontext()
        if name != "__base__":
            set_adapter(model, name)
        with context:
            found[row] = model(images[row : row + 1])[0].detach()
    return found


class Blocks:
    """Which blocks' prompts were grouped, and what came out."""

    def __init__(self, monkeypatch) -> None:
        self.names: dict[int, tuple[str, ...]] = {}
        original = GroupedPrompts.__call__

        def seen(this, x, adapters, names, block, skip):
            self.names[block] = names
            out = original(this, x, adapters, names, block, skip)
            unprompted = [i for i, name in enumerate(MIXED) if name not in names]
            assert torch.equal(out[unprompted], x[unprompted])
            return out

        monkeypatch.setattr(GroupedPrompts, "__call__", seen)


@pytest.mark.parametrize("limit", [grouped._MOST_WEIGHTS, 3000, 0], ids=["all", "two", "each"])
@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_routing_groups_all_that_prompt_a_block(served, monkeypatch, no_grad, limit):
    images = torch.randn(6, 3, 16, 16)
    expected = alone(served, images)
    monkeypatch.setattr(grouped, "_MOST_WEIGHTS", limit)
    blocks = Blocks(monkeypatch)
    with no_grad(), routing.route(served, MIXED):
        torch.testing.assert_close(served(images), expected, rtol=1e-5, atol=1e-6)
    assert blocks.names == {0: ("a", "b"), 1: ("c", "a", "b"), 2: ("c", "a", "b"), 3: ("a", "b")}


def test_the_weights_of_a_pass_are_those_of_now_however_they_were_written(served):
    images = torch.randn(6, 3, 16, 16)
    context = routing.route(served, MIXED)
    with torch.no_grad(), context:
        before = served(images)
        for parameter in served.svp.adapters["b"].parameters():
            parameter.data.mul_(-1)
        within = served(images)
    expected = alone(served, images)
    torch.testing.assert_close(within, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before[3], within[3], atol=1e-3)
    with torch.no_grad(), context:
        torch.testing.assert_close(served(images), expected, rtol=1e-5, atol=1e-6)


def test_a_block_called_alone_finds_no_weights_of_another_pass(served):
    tokens = torch.randn(6, 17, 16)
    with torch.no_grad(), routing.route(served, MIXED):
        served.svp(tokens, 0, (8,))  # of a pass that ends here
        for name in ("a", "b", "c"):
            for parameter in served.svp.adapters[name].parameters():
                parameter.data.mul_(-1)
        first = served.svp(tokens, 3, (8,))
        assert served.svp.routing._grouped._run is None
    with torch.no_grad():
        own = served.svp.adapters["b"](tokens[3:4], 3, (8,))
    torch.testing.assert_close(first[3:4], own, rtol=1e-5, atol=1e-6)


class Calls(TorchDispatchMode):
    """Counts what runs: on a GPU, each is a launch, unless it is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.count += not function.is_view
        return out


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_a_block_costs_as_many_launches_for_eight_adapters_as_for_two(context):
    def launches(count: int) -> list[int]:
        named = {str(k): adapter() for k in range(count)}
        # mixed, and one image without a prompt
        rows = {name: [index, index + count] for index, name in enumerate(named)}
        prompts = GroupedPrompts(rows, 2 * count + 1)
        tokens, found = torch.randn(2 * count + 1, 7, 8), []
        for _ in range(2):
            for block in range(4):
                with context(), Calls() as calls:
                    prompts(tokens, named, tuple(named), block, (3,))
                found.append(calls.count)
        return found[4:]

    # the scales of an adapter are taken apart by a view each
    assert launches(2) == launches(8)
    assert max(launches(8)[1:]) <= (13 if context is torch.no_grad else 25)


def test_a_context_of_inference_mode_may_be_trained_in(served):
    images = torch.randn(6, 3, 16, 16)
    context = routing.route(served, MIXED)
    with torch.inference_mode(), context:
        served(images)
    with context:
        served(images).square().sum().backward()
    assert served.svp.adapters["c"].alpha.grad.any()


@pytest.mark.gpu
def test_grouped_prompts_on_a_gpu_equal_those_on_a_cpu():
    adapters = [adapter(), adapter()]
    parts = [torch.randn(2, 7, 8), torch.randn(3, 7, 8)]
    expected = prompt_grouped(parts, adapters, 1, (3,))
    moved = prompt_grouped([p.cuda() for p in parts], [a.cuda() for a in adapters], 1, (3,))
    for one, other in zip(expected, moved, strict=True):
        torch.testing.assert_close(other.cpu(), one, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_mixed_pass_follows_the_weights(dtype):
    model = tiny.trained(name="a")
    for name in ("b", "c"):
        add_adapter(model, name, tiny.CONFIG)
        tiny.randomise(model, name, seed=ord(name))
    model.cuda()
    images, context = torch.randn(6, 3, 16, 16, device="cuda"), routing.route(model, MIXED)

    def run() -> torch.Tensor:
        with context:
            return model(images)

    # autocast's cache would keep copies that are made while the graph is captured
    mixed = torch.autocast("cuda", dtype, enabled=dtype != torch.float32, cache_enabled=False)
    with torch.no_grad(), mixed:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            before = run().clone()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        for parameter in model.svp.adapters["b"].parameters():
            parameter.data.mul_(-1)
        graph.replay()
        expected = alone(model, images).cuda()
    # products of other batch sizes round differently, in bfloat16 to 8 bits
    bound = 1e-3 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found.float(), expected, rtol=bound, atol=bound)
    assert not torch.allclose(before[3], found[3], atol=bound)
