import pytest
import torch
from torch import nn

from svp_peft.config import SVPConfig
from svp_peft.grouped import can_group, prompt_grouped
from svp_peft.prompters import SVPAdapter


def adapter(**fields) -> SVPAdapter:
    made = SVPAdapter(8, 4, SVPConfig(**{"inner_bottleneck": 3, **fields}))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


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


def test_routing_on_a_gpu_goes_through_it(monkeypatch):
    from svp_peft import routing
    from svp_peft.adapters import add_adapter
    from svp_peft.patch import apply_svp
    from tests.lookalikes import VimLike

    model = apply_svp(VimLike().eval(), SVPConfig(inner_bottleneck=3), adapter_name="a")
    add_adapter(model, "b")
    for name in ("a", "b"):
        for parameter in model.svp.adapters[name].parameters():
            nn.init.normal_(parameter, std=0.3)
    images = torch.randn(4, 3, 16, 16)
    names = ["a", "b", "__base__", "b"]
    with routing.route(model, names):
        expected = model(images)
    calls = []

    def grouped(*arguments):
        calls.append(1)
        return prompt_grouped(*arguments)

    monkeypatch.setattr(routing, "prompt_grouped", grouped)
    monkeypatch.setattr(routing, "_on_gpu", lambda x: True)
    with routing.route(model, names):
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == 4


@pytest.mark.gpu
def test_grouped_prompts_on_a_gpu_equal_those_on_a_cpu():
    adapters = [adapter(), adapter()]
    parts = [torch.randn(2, 7, 8), torch.randn(3, 7, 8)]
    expected = prompt_grouped(parts, adapters, 1, (3,))
    moved = prompt_grouped([p.cuda() for p in parts], [a.cuda() for a in adapters], 1, (3,))
    for one, other in zip(expected, moved, strict=True):
        torch.testing.assert_close(other.cpu(), one, rtol=1e-3, atol=1e-3)
