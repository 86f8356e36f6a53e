import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svp_peft.config import SVPConfig
from svp_peft.errors import ConfigError, InputError
from svp_peft.prompters import CrossPrompter, InnerPrompter, NamedModules, SVPAdapter, simam

D, DEPTH = 8, 5


def trained(config: SVPConfig, widths=D, depth: int = DEPTH) -> SVPAdapter:
    """An adapter in float64 whose parameters are all random."""
    adapter = SVPAdapter(widths, depth, config).double()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    return adapter


def test_forward_is_the_equation_of_the_module_docstring():
    adapter = trained(SVPConfig(inner_bottleneck=3, cross_group_size=2))
    x = torch.randn(2, 7, D, dtype=torch.float64)
    for block in range(DEPTH):
        group = block // 2
        expected = x + adapter.alpha[group] * adapter.cross[group](x)
        expected = expected + adapter.beta[block] * adapter.inner[block](x)
        # float64: only the order of the sums differs
        torch.testing.assert_close(adapter(x, block), expected, rtol=1e-13, atol=1e-13)


def test_prompters_are_the_formulas_in_their_docstrings():
    x = torch.randn(3, D)
    inner, cross = InnerPrompter(D, 3), CrossPrompter(D)
    down = F.linear(x, inner.down.weight, inner.down.bias)
    assert torch.equal(inner(x), F.silu(F.linear(down, inner.up.weight, inner.up.bias)))
    assert torch.equal(cross(x), F.silu(F.linear(x, cross.weight, cross.bias)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("source", ["token", "released"])
def test_a_fresh_adapter_changes_no_bit(dtype, source):
    adapter = SVPAdapter(D, 4, SVPConfig(cross_source=source, cross_group_size=2))
    adapter.to(torch.promote_types(dtype, torch.float32))
    x = torch.randn(2, 7, D).to(dtype)
    for block in range(4):
        out = adapter(x, block, (3,))
        assert out.dtype == dtype
        assert torch.equal(out, x)


def test_class_tokens_get_no_prompt_and_x_is_not_modified():
    adapter = trained(SVPConfig())
    x = torch.randn(2, 7, D, dtype=torch.float64)
    before = x.clone()
    out = adapter(x, 0, (0, 3))
    assert torch.equal(x, before)
    assert torch.equal(out[:, [0, 3]], x[:, [0, 3]])
    assert (out != x).any(-1)[:, [1, 2, 4, 5, 6]].all()


def test_released_second_half_takes_the_cross_prompt_of_the_prompted_first_half():
    adapter = trained(SVPConfig(cross_source="released", cross_group_size=2), depth=4)
    x = torch.randn(2, 9, D, dtype=torch.float64)
    cross, inner, alpha, beta = adapter.parts(3)
    first, second = x[:, :4], x[:, 5:]
    first = first + inner(first) * beta + cross(first) * alpha
    second = second + inner(second) * beta + cross(first) * alpha
    expected = torch.cat((first, x[:, 4:5], second), 1)
    torch.testing.assert_close(adapter(x, 3, (4,)), expected, rtol=1e-13, atol=1e-13)


def test_released_draws_dropout_in_the_order_of_the_authors_code():
    adapter = trained(SVPConfig(cross_source="released", cross_group_size=2, dropout=0.4), depth=4)
    x = torch.randn(2, 9, D, dtype=torch.float64)
    cross, inner, alpha, beta = adapter.parts(0)
    torch.manual_seed(3)
    out = adapter(x, 0, (4,))
    torch.manual_seed(3)
    first, second = x[:, :4], x[:, 5:]
    inner_first, cross_first = (F.dropout(p, 0.4) for p in (inner(first), cross(first)))
    first = first + inner_first * beta + cross_first * alpha
    inner_second = F.dropout(inner(second), 0.4)
    second = second + inner_second * beta + F.dropout(cross(first), 0.4) * alpha
    expected = torch.cat((first, x[:, 4:5], second), 1)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("skip", [(), (3,), (0, 7)])
def test_released_refuses_unequal_halves(skip):
    adapter = SVPAdapter(D, 4, SVPConfig(cross_source="released", cross_group_size=2))
    with pytest.raises(InputError, match="as many tokens before the class token as after"):
        adapter(torch.randn(1, 8, D), 0, skip)


def test_last_cross_group_may_be_shorter():
    adapter = SVPAdapter(D, 5, SVPConfig(cross_group_size=2))
    assert len(adapter.cross) == 3
    assert adapter.alpha.shape == (3, D)
    assert adapter.parts(4)[0] is adapter.cross[2]


def test_released_refuses_a_depth_that_the_group_size_does_not_divide():
    with pytest.raises(ConfigError, match=r"5 blocks.*divisible"):
        SVPAdapter(D, 5, SVPConfig(cross_source="released", cross_group_size=2))


def test_dropout_acts_in_training_only():
    adapter = trained(SVPConfig(dropout=0.5))
    x = torch.randn(1, 4, D, dtype=torch.float64)
    assert not torch.equal(adapter(x, 0), adapter(x, 0))
    adapter.eval()
    assert torch.equal(adapter(x, 0), adapter(x, 0))


@pytest.mark.parametrize(("off", "scale"), [("use_cross", "alpha"), ("use_inner", "beta")])
def test_an_ablated_prompter_has_no_parameters(off, scale):
    adapter = trained(SVPConfig(**{off: False}))
    assert getattr(adapter, scale) is None
    names = {name.split(".")[0] for name, _ in adapter.named_parameters()}
    kept = {"use_cross": {"inner", "beta"}, "use_inner": {"cross", "alpha"}}
    assert names == kept[off]
    x = torch.randn(1, 4, D, dtype=torch.float64)
    part = adapter.inner[0](x) * adapter.beta[0] if off == "use_cross" else None
    part = adapter.cross[0](x) * adapter.alpha[0] if part is None else part
    torch.testing.assert_close(adapter(x, 0), x + part, rtol=1e-13, atol=1e-13)


def test_layers_leave_other_blocks_alone_and_build_nothing_for_them():
    adapter = trained(SVPConfig(layers=(1, 4), cross_group_size=2))
    x = torch.randn(1, 4, D, dtype=torch.float64)
    assert [torch.equal(adapter(x, block), x) for block in range(5)] == [
        True,
        False,
        True,
        True,
        False,
    ]
    assert adapter.inner.names() == ["1", "4"]
    assert adapter.cross.names() == ["0", "2"]
    assert adapter.beta.shape == (5, D)


def test_every_parameter_of_a_prompted_adapter_gets_a_gradient():
    for config in (SVPConfig(cross_group_size=2), SVPConfig(layers=(1, 4), cross_group_size=2)):
        adapter = trained(config)
        x = torch.randn(2, 4, D, dtype=torch.float64)
        for block in range(DEPTH):
            x = adapter(x, block)
        x.square().sum().backward()
        assert [name for name, p in adapter.named_parameters() if p.grad is None] == []


def test_layers_beyond_the_depth_are_refused():
    with pytest.raises(ConfigError, match=r"names block 7, but the model has 5 blocks"):
        SVPAdapter(D, DEPTH, SVPConfig(layers=(0, 7)))


def test_cross_groups_never_cross_a_change_of_width():
    adapter = trained(SVPConfig(cross_group_size=2), widths=(4, 4, 4, 8, 8), depth=5)
    assert [prompter.in_features for prompter in adapter.cross] == [4, 4, 8]
    assert [tuple(t.shape) for t in adapter.alpha] == [(2, 4), (1, 8)]
    assert [tuple(t.shape) for t in adapter.beta] == [(3, 4), (2, 8)]
    for block, width in enumerate((4, 4, 4, 8, 8)):
        x = torch.randn(1, 3, width, dtype=torch.float64)
        cross, inner, alpha, beta = adapter.parts(block)
        expected = x + alpha * cross(x) + beta * inner(x)
        torch.testing.assert_close(adapter(x, block), expected, rtol=1e-13, atol=1e-13)


def test_parameter_count_is_that_of_the_released_model():
    # Vim-S with groups of 8 and a bottleneck of 64, counted on the released code
    adapter = SVPAdapter(384, 24, SVPConfig())
    assert sum(p.numel() for p in adapter.parameters()) == 1_644_288


def test_simam_is_the_formula_in_its_docstring_for_every_channel_of_every_image():
    images = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    for image, result in zip(images, simam(images), strict=True):
        for x, out in zip(image, result, strict=True):
            d = (x - x.mean()) ** 2
            weight = torch.sigmoid(d / (4 * (d.sum() / (5 * 7 - 1) + 1e-3)) + 0.5)
            torch.testing.assert_close(out, x * weight, rtol=1e-13, atol=1e-13)


def test_simam_keeps_the_dtype():
    assert simam(torch.randn(1, 3, 4, 4).half()).dtype == torch.float16


def test_named_modules_take_names_that_modules_use_themselves():
    names = ["train", "keys", "_modules", "forward", "training", "a", "0", "train_"]
    container = NamedModules()
    layers = {name: nn.Linear(1, 1) for name in names}
    for name, layer in layers.items():
        container[name] = layer
    assert container.names() == names
    assert all(container[name] is layer for name, layer in layers.items())
    assert callable(container.train)
    twin = pickle.loads(pickle.dumps(container))
    assert twin.names() == names
    assert twin.state_dict().keys() == container.state_dict().keys()
    assert container.pop("train") is layers["train"]
    assert "train" not in container
    # "keys/" is how "keys" is stored
    assert "keys" in container
    assert "keys/" not in container
    assert len(container) == len(names) - 1


def test_no_graph_outlives_a_step():
    adapter = SVPAdapter(8, 3, SVPConfig(inner_bottleneck=2, cross_group_size=2))
    x = torch.randn(2, 5, 8)
    for block in range(3):
        x = adapter(x, block)
    node = weakref.ref(x.grad_fn)
    del x
    gc.collect()
    assert node() is None
    assert adapter._alpha_rows.prepared is None
    assert adapter._beta_rows.prepared is None


def test_blocks_out_of_order_get_their_own_rows():
    adapter = SVPAdapter(8, 3, SVPConfig(inner_bottleneck=2, cross_group_size=1))
    with torch.no_grad():
        adapter.alpha.copy_(torch.arange(3.0)[:, None].expand(3, 8))
        adapter.beta.copy_(10 + torch.arange(3.0)[:, None].expand(3, 8))
    for block in (1, 0, 2, 1, 0, 0, 2):
        _, _, alpha, beta = adapter.parts(block)
        assert alpha[0] == block
        assert beta[0] == 10 + block


def test_gradients_of_the_scales_add_up_over_two_forward_passes():
    adapter = SVPAdapter(8, 3, SVPConfig(inner_bottleneck=2, cross_group_size=2))
    nn.init.normal_(adapter.alpha)
    x = torch.randn(2, 5, 8)

    def loss(tokens):
        for block in range(3):
            tokens = adapter(tokens, block)
        return tokens.square().sum()

    (loss(x) + loss(2 * x)).backward()
    together = adapter.alpha.grad.clone()
    adapter.zero_grad()
    loss(x).backward()
    loss(2 * x).backward()
    torch.testing.assert_close(adapter.alpha.grad, together)
