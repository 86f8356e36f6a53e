"""The C++ kernels against the reference in float64: values, gradients, edges of the ranges.

Tolerances, as relative L2 error per tensor: 2e-6 for a few roundings of float32 (6e-8 each) added
up over at most 3,137 tokens; the kernels are at 1e-7 to 7e-7 in these tests. Where a test needs
another one it says why.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from svp_peft.errors import BackendError, InputError
from svp_peft.ops import backends, cpu, reference
from svp_peft.ops.types import ScanGrads, ScanNeeds

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    cpu.unavailable(CPU) is not None, reason=f"no C++ kernels: {cpu.unavailable(CPU)}"
)

NAMES = ("u", "dt", "B", "C", "z", "A_log", "D", "dt_weight", "dt_bias")
ALL = ScanNeeds(*[True] * 9)

# (batch, L, d_inner, d_state, dt_rank): one token, odd widths, every block of registers, long
SIZES = [
    (1, 1, 16, 16, 1),
    (2, 1, 5, 3, 2),
    (3, 2, 33, 8, 4),
    (2, 3, 48, 16, 3),
    (1, 197, 70, 16, 5),
    (2, 37, 300, 16, 24),
    (2, 20, 17, 32, 2),
    (1, 33, 9, 64, 3),
    (1, 18, 6, 13, 2),
    (1, 3137, 18, 16, 2),
]


def relative(value: Tensor, truth: Tensor) -> float:
    error = (value.double() - truth.double()).norm()
    return (error / truth.double().norm().clamp_min(1e-30)).item()


def scan_inputs(
    batch: int, length: int, d_inner: int, d_state: int, dt_rank: int, directions: int = 2
) -> dict[str, list[Tensor]]:
    """Float64 tensors with float32 values, so that both sides see the same numbers."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).double()

    def each(make, *shape: int) -> list[Tensor]:
        return [make(*shape) for _ in range(directions)]

    def rates() -> Tensor:
        integers = torch.arange(1, d_state + 1).float()
        return (torch.log(integers) + 0.1 * torch.randn(d_inner, d_state)).double()

    return {
        "u": each(draw, batch, length, d_inner),
        "dt": each(draw, batch, length, dt_rank),
        "B": each(draw, batch, length, d_state),
        "C": each(draw, batch, length, d_state),
        "z": [draw(batch, length, d_inner)],
        "A_log": each(rates),
        "D": each(draw, d_inner),
        "dt_weight": [0.3 * a for a in each(draw, d_inner, dt_rank)],
        "dt_bias": [a - 4.0 for a in each(draw, d_inner)],
    }  # fmt: skip


def single(inputs: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [t.float() for t in group] for name, group in inputs.items()}


def arguments(inputs: dict[str, list[Tensor]]) -> list:
    """In the order of the signature; an empty group is an absent one, z is no tuple."""
    groups = [tuple(inputs[name]) or None for name in NAMES]
    groups[4] = groups[4] and groups[4][0]
    return groups


def options(inputs: dict[str, list[Tensor]], **changed) -> dict:
    reverse = (False, True)[: len(inputs["u"])]
    return {"reverse": reverse, "softplus": True, "scale": 0.5, "A_is_log": True} | changed


def truth(inputs: dict[str, list[Tensor]], grad: Tensor, **changed) -> tuple[Tensor, Tensor, dict]:
    """out, y and the gradients by name, all in float64."""
    leaves = {n: [t.clone().requires_grad_() for t in group] for n, group in inputs.items()}
    out, y = reference.scan(*arguments(leaves), **options(inputs, **changed))
    flat = [t for name in NAMES for t in leaves[name]]
    found = iter(torch.autograd.grad(out, flat, grad.double(), allow_unused=True))
    return out.detach(), y.detach(), {name: [next(found) for _ in leaves[name]] for name in NAMES}


def backward(
    inputs: dict[str, list[Tensor]], grad: Tensor, y: Tensor | None, need=ALL, **extra
) -> ScanGrads:
    values = arguments(inputs)
    settings = options(inputs) | extra
    return cpu.scan_backward(grad, *values[:5], y, *values[5:], need=need, **settings)


def assert_gradients(found: ScanGrads, expected: dict, limit: float = 2e-6) -> None:
    for name, group in zip(NAMES, found, strict=True):
        tensors = (group,) if isinstance(group, Tensor) else group or ()
        wanted = [t for t in expected[name] if t is not None]
        assert len(tensors) == len(wanted), name
        for value, true in zip(tensors, wanted, strict=True):
            assert value.dtype == torch.float32
            assert value.shape == true.shape, name
            assert relative(value, true) < limit or torch.equal(value, true.float()), name


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that an element that is never written shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def filled(*args, original=original, **kwargs):
            fresh = original(*args, **kwargs)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        monkeypatch.setattr(owner, name, filled)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scan_and_all_its_gradients_match_float64(size: tuple[int, ...]) -> None:
    inputs = scan_inputs(*size)
    grad = torch.randn(size[0], size[1], size[2])
    out, y, expected = truth(inputs, grad)
    got, got_y = cpu.scan(*arguments(single(inputs)), save_y=True, **options(inputs))
    assert relative(got, out) < 2e-6
    assert relative(got_y, y) < 2e-6
    assert_gradients(backward(single(inputs), grad, got_y), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("absent", ["z", "D", "dt_bias", "dt_weight"])
def test_an_absent_tensor_counts_as_its_neutral_value(absent: str) -> None:
    inputs = scan_inputs(2, 21, 40, 16, 40 if absent == "dt_weight" else 3)
    inputs[absent] = []
    grad = torch.randn(2, 21, 40)
    out, _, expected = truth(inputs, grad)
    got, got_y = cpu.scan(*arguments(single(inputs)), save_y=True, **options(inputs))
    assert relative(got, out) < 2e-6
    assert_gradients(backward(single(inputs), grad, got_y), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("back", [False, True])
def test_one_direction_without_softplus_and_with_A_itself(back: bool) -> None:
    inputs = scan_inputs(2, 30, 24, 16, 24, directions=1)
    inputs["dt_weight"] = []
    inputs["dt"] = [t.abs() * 0.1 for t in inputs["dt"]]
    inputs["dt_bias"] = [t * 0.0 + 0.05 for t in inputs["dt_bias"]]
    # any sign: some states grow
    inputs["A_log"] = [(0.3 * torch.randn(24, 16)).double() - 0.2]
    changed = {"softplus": False, "A_is_log": False, "reverse": (back,), "scale": 1.0}
    grad = torch.randn(2, 30, 24)
    out, _, expected = truth(inputs, grad, **changed)
    settings = options(inputs, **changed)
    got, got_y = cpu.scan(*arguments(single(inputs)), save_y=True, **settings)
    assert relative(got, out) < 2e-6
    assert_gradients(backward(single(inputs), grad, got_y, **changed), expected)


def test_dz_needs_no_saved_y() -> None:
    inputs = single(scan_inputs(2, 19, 40, 16, 3))
    grad = torch.randn(2, 19, 40)
    _, y = cpu.scan(*arguments(inputs), save_y=True, **options(inputs))
    assert torch.equal(backward(inputs, grad, None).dz, backward(inputs, grad, y).dz)


def test_saving_y_changes_nothing_else() -> None:
    inputs = single(scan_inputs(2, 19, 40, 16, 3))
    with_y, _ = cpu.scan(*arguments(inputs), save_y=True, **options(inputs))
    without, none = cpu.scan(*arguments(inputs), save_y=False, **options(inputs))
    assert none is None
    assert torch.equal(with_y, without)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ScanNeeds._fields)
def test_each_gradient_alone_equals_itself_among_all(name: str) -> None:
    inputs = single(scan_inputs(2, 19, 40, 16, 3))
    grad = torch.randn(2, 19, 40)
    _, y = cpu.scan(*arguments(inputs), save_y=True, **options(inputs))
    everything = backward(inputs, grad, y)
    alone = backward(inputs, grad, y, need=ScanNeeds(*[f == name for f in ScanNeeds._fields]))
    for field, one, all_ in zip(ScanNeeds._fields, alone, everything, strict=True):
        if field != name:
            assert one is None, f"{field} was made and not asked for"
            continue
        pairs = [(one, all_)] if isinstance(one, Tensor) else zip(one, all_, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.usefixtures("poisoned")
def test_views_are_read_and_written_in_place() -> None:
    batch, length, d_inner, d_state, rank = 2, 23, 40, 16, 3
    inputs = scan_inputs(batch, length, d_inner, d_state, rank)
    grad = torch.randn(batch, length, d_inner)
    _, _, expected = truth(inputs, grad)
    plain = single(inputs)
    low = [torch.cat([plain[n][k] for n in ("dt", "B", "C")], dim=-1) for k in range(2)]
    xz = torch.cat([plain["u"][0], plain["z"][0]], dim=-1)
    widths = (rank, d_state, d_state)
    pieces = [x.split(widths, dim=-1) for x in low]
    views = plain | {n: [p[i] for p in pieces] for i, n in enumerate(("dt", "B", "C"))}
    views["z"] = [xz[..., d_inner:]]
    views["u"] = [xz[..., :d_inner], plain["u"][1].transpose(0, 1).contiguous().transpose(0, 1)]
    d_xz = torch.empty_like(xz)
    d_low = [torch.empty_like(x) for x in low]
    _, y = cpu.scan(*arguments(views), save_y=True, **options(views))
    found = backward(
        views, grad.transpose(1, 2).contiguous().transpose(1, 2), y,
        dz_out=d_xz[..., d_inner:], dx_dbl_out=d_low,
    )  # fmt: skip
    assert_gradients(found, expected)
    assert found.dz.data_ptr() == d_xz[..., d_inner:].data_ptr()
    assert found.dC[1].data_ptr() == d_low[1][..., rank + d_state :].data_ptr()
    assert d_xz[..., :d_inner].isnan().all(), "the kernel wrote beside its view"
    assert not any(x.isnan().any() for x in d_low)


def test_columns_that_do_not_lie_side_by_side_are_copied() -> None:
    inputs = single(scan_inputs(2, 19, 40, 16, 3))
    grad = torch.randn(2, 19, 40)
    scattered = {
        n: [t.mT.contiguous().mT if t.dim() == 3 else t for t in g] for n, g in inputs.items()
    }
    out, y = cpu.scan(*arguments(inputs), save_y=True, **options(inputs))
    out_s, y_s = cpu.scan(*arguments(scattered), save_y=True, **options(inputs))
    assert torch.equal(out, out_s)
    grads, grads_s = backward(inputs, grad, y), backward(scattered, grad, y_s)
    for one, other in zip(grads.du, grads_s.du, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_may_have_another_dtype(dtype: torch.dtype) -> None:
    inputs = single(scan_inputs(1, 9, 24, 16, 3))
    for name in ("A_log", "D", "dt_weight", "dt_bias"):
        inputs[name] = [t.bfloat16().float() for t in inputs[name]]
    same = inputs | {
        n: [t.to(dtype) for t in inputs[n]] for n in ("A_log", "D", "dt_weight", "dt_bias")
    }
    out, y = cpu.scan(*arguments(inputs), save_y=True, **options(inputs))
    assert torch.equal(out, cpu.scan(*arguments(same), save_y=False, **options(inputs))[0])
    grad = torch.randn_like(out)
    assert torch.equal(backward(inputs, grad, y).ddt[1], backward(same, grad, y).ddt[1])


def test_activations_of_another_dtype_are_refused() -> None:
    inputs = scan_inputs(1, 9, 24, 16, 3)
    with pytest.raises(InputError, match="compute in float32 and got torch"):
        cpu.scan(*arguments(inputs), save_y=False, **options(inputs))


def test_decay_is_exact_to_the_last_digits_over_its_whole_range() -> None:
    """One impulse and one step: out_1 = C exp(delta A) delta B, for A from -1e-3 to -50.

    Tolerance per element: an error of half a unit in the last place of A shifts exp(x) by
    |x| 6e-8; 2e-7 more for the other roundings.
    """
    d_state = 16
    rates = torch.logspace(-3, torch.log10(torch.tensor(50.0)).item(), 64 * d_state)
    A = -rates.view(64, d_state)
    for n in range(d_state):
        delta = torch.tensor([0.7, 1.3]).expand(1, 64, 2).mT.contiguous()
        u = torch.tensor([1.0, 0.0]).expand(1, 64, 2).mT.contiguous()
        C = torch.zeros(1, 2, d_state)
        C[..., n] = 1.0
        out, _ = cpu.scan(
            [u], [delta], [torch.ones_like(C)], [C], None, [A], None, None, None,
            reverse=(False,), softplus=False, scale=1.0, A_is_log=False, save_y=False,
        )  # fmt: skip
        exponent = delta[0, 1, 0].double() * A[:, n].double()
        expected = exponent.exp() * delta[0, 0, 0].double()
        error = ((out[0, 1].double() - expected) / expected).abs()
        assert (error < 2e-7 + 1.5e-7 * exponent.abs()).all()


def test_softplus_keeps_its_digits_from_minus_80_to_100() -> None:
    """delta alone: with B = C = 1, u = 1 and one step, y = delta. 3e-7: a few float32 roundings."""
    x = torch.cat([torch.linspace(-80, 100, 1024 - 4), torch.tensor([19.99, 20.01, 1e-30, 0.0])])
    ones = torch.ones(1, 1, 1024)
    state = torch.ones(1, 1, 1)
    out, _ = cpu.scan(
        [ones], [x.view(1, 1, -1)], [state], [state], None, [torch.zeros(1024, 1)], None, None,
        None, reverse=(False,), softplus=True, scale=1.0, save_y=False,
    )  # fmt: skip
    expected = torch.log1p(x.double().exp())
    assert ((out[0, 0].double() - expected) / expected).abs().max() < 3e-7


def test_strong_decay_and_saturated_softplus_match_float64() -> None:
    inputs = scan_inputs(2, 64, 40, 16, 3)
    inputs["A_log"] = [torch.linspace(-6.9, 3.9, 40 * 16).view(40, 16).float().double()] * 2
    inputs["dt_bias"] = [torch.linspace(-12, 30, 40).double()] * 2
    grad = torch.randn(2, 64, 40)
    out, _, expected = truth(inputs, grad)
    got, y = cpu.scan(*arguments(single(inputs)), save_y=True, **options(inputs))
    assert relative(got, out) < 2e-6
    # A's gradient cancels where softplus saturates: its terms are 1e3 times their sum
    expected_A = expected.pop("A_log")
    found = backward(single(inputs), grad, y)
    assert_gradients(found._replace(dA=None), expected | {"A_log": []})
    for value, true in zip(found.dA, expected_A, strict=True):
        assert relative(value, true) < 2e-5


def test_a_gradient_at_one_token_alone_reaches_all_before_it() -> None:
    inputs = scan_inputs(1, 197, 24, 16, 3)
    grad = torch.zeros(1, 197, 24)
    grad[:, 98] = torch.randn(24)
    _, _, expected = truth(inputs, grad)
    _, y = cpu.scan(*arguments(single(inputs)), save_y=True, **options(inputs))
    assert_gradients(backward(single(inputs), grad, y), expected)


@pytest.mark.parametrize("where", ["u", "z", "dt", "B", "C"])
def test_a_nan_goes_where_the_formula_takes_it_and_nowhere_else(where: str) -> None:
    inputs = scan_inputs(2, 40, 40, 16, 3)
    index = 0
    inputs[where][0][1, 20, index] = float("nan")
    expected, _ = reference.scan(*arguments(inputs), **options(inputs))
    got, _ = cpu.scan(*arguments(single(inputs)), save_y=False, **options(inputs))
    assert torch.equal(got.isnan(), expected.isnan())
    assert got.isnan().any()
    assert not got.isnan().all()


@pytest.mark.parametrize("size", [(8, 50, 96, 16, 6), (1, 33, 600, 16, 6)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(size: tuple[int, ...]) -> None:
    inputs = single(scan_inputs(*size))
    grad = torch.randn(size[0], size[1], size[2])
    taps = [torch.randn(size[2], 4) for _ in range(2)]
    alpha = torch.randn(size[2])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out, y = cpu.scan(*arguments(inputs), save_y=True, **options(inputs))
            # dt_weight is left out: its sum is a matrix product by PyTorch
            grads = backward(inputs, grad, y, need=ALL._replace(dt=False, dt_weight=False))
            flat = [
                t for g in grads if g is not None for t in ([g] if isinstance(g, Tensor) else g)
            ]
            conv = cpu.conv_silu_backward(
                inputs["u"], grad, taps, [alpha, alpha], (False, True),
                need_x=True, need_weight=True, need_bias=True,
            )  # fmt: skip
            norm = cpu.add_norm_backward(
                grad, None, inputs["u"][0], alpha, eps=1e-5, rms=False, need_weight=True,
                need_bias=True, hidden_dtype=torch.float32, residual_in_dtype=None,
            )  # fmt: skip
            prompt = cpu.prompt_backward(grad, *inputs["u"], alpha, alpha, (3,))
            results.append([out, *flat, conv[0], *conv[1], *conv[2], norm[0], *norm[2:], *prompt])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_empty_batch_gives_an_empty_result() -> None:
    inputs = single(scan_inputs(0, 5, 24, 16, 3))
    out, y = cpu.scan(*arguments(inputs), save_y=True, **options(inputs))
    assert out.shape == y.shape == (0, 5, 24)
    grads = backward(inputs, torch.randn(0, 5, 24), y)
    assert grads.du[0].shape == (0, 5, 24)
    assert torch.equal(grads.dD[0], torch.zeros(24))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("batch", "length", "d_inner", "width"),
    [(2, 1, 5, 4), (1, 3, 64, 4), (2, 37, 70, 4), (3, 5, 40, 3), (1, 2, 33, 6), (1, 197, 80, 1)],
)
@pytest.mark.parametrize("directions", [1, 2])
def test_convolution_and_its_gradients_match_float64(
    batch: int, length: int, d_inner: int, width: int, directions: int
) -> None:
    reverse = (False, True)[:directions]
    xz = torch.randn(batch, length, 2 * d_inner)
    x = xz[..., :d_inner]
    weight = [torch.randn(d_inner, width) for _ in reverse]
    bias = [torch.randn(d_inner) for _ in reverse]
    grads = [torch.randn(batch, length, d_inner) for _ in reverse]
    leaf, *parameters = (t.double().requires_grad_() for t in (x, *weight, *bias))
    expected = reference.conv_silu(leaf, parameters[:directions], parameters[directions:], reverse)
    gradients = torch.autograd.grad(expected, [leaf, *parameters], [g.double() for g in grads])
    d_xz = torch.empty_like(xz)
    found = cpu.conv_silu(x, weight, bias, reverse)
    dx, d_weight, d_bias = cpu.conv_silu_backward(
        grads, x, weight, bias, reverse, dx_out=d_xz[..., :d_inner],
        need_x=True, need_weight=True, need_bias=True,
    )  # fmt: skip
    for value, true in zip(found, expected, strict=True):
        assert relative(value, true) < 2e-6
    for value, true in zip((dx, *d_weight, *d_bias), gradients, strict=True):
        assert relative(value, true) < 2e-6
    assert dx.data_ptr() == d_xz.data_ptr()
    assert d_xz[..., d_inner:].isnan().all()


def test_convolution_without_bias_makes_only_what_is_asked_for() -> None:
    x, weight = torch.randn(2, 9, 20), [torch.randn(20, 4)]
    expected = reference.conv_silu(x.double(), [weight[0].double()], None, (True,))[0]
    assert relative(cpu.conv_silu(x, weight, None, (True,))[0], expected) < 2e-6
    nothing = cpu.conv_silu_backward(
        [x], x, weight, None, (True,), need_x=False, need_weight=False, need_bias=True
    )
    assert nothing == (None, None, None)


@pytest.mark.parametrize("value", [float("nan"), 90.0, -90.0, 1e30, -1e30])
def test_silu_of_an_extreme_value_is_pytorchs(value: float) -> None:
    x = torch.full((1, 1, 20), value)
    got = cpu.conv_silu(x, [torch.ones(20, 1)], None, (False,))[0]
    torch.testing.assert_close(got, torch.nn.functional.silu(x), equal_nan=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("shape", [(2, 1, 5), (3, 50, 33), (2, 197, 384), (7, 48), (64,)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_norm_and_its_gradients_match_float64(
    shape: tuple[int, ...], rms: bool, with_residual: bool
) -> None:
    hidden, residual, grad_y, grad_total = (torch.randn(shape) for _ in range(4))
    weight, bias = torch.randn(shape[-1]), torch.randn(shape[-1])
    settings = {"eps": 1e-5, "rms": rms}
    leaves = [t.double().requires_grad_() for t in (hidden, residual, weight, bias)]
    given = [leaves[0], leaves[1] if with_residual else None, *leaves[2:]]
    expected = reference.add_norm(*given, residual_dtype=torch.float64, **settings)
    gradients = torch.autograd.grad(
        expected, [t for t in given if t is not None], (grad_y.double(), grad_total.double())
    )
    y, total = cpu.add_norm(
        hidden, residual if with_residual else None, weight, bias,
        residual_dtype=torch.float32, **settings,
    )  # fmt: skip
    found = cpu.add_norm_backward(
        grad_y, grad_total, total, weight, need_weight=True, need_bias=True,
        hidden_dtype=torch.float32, residual_in_dtype=torch.float32 if with_residual else None,
        **settings,
    )  # fmt: skip
    assert relative(y, expected[0]) < 2e-6
    assert relative(total, expected[1]) < 2e-6
    for value, true in zip([f for f in found if f is not None], gradients, strict=True):
        assert relative(value, true) < 2e-6


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(2, 1, 5), (3, 50, 33), (2, 197, 48)])
def test_prompt_and_its_gradients_match_float64(shape: tuple[int, int, int]) -> None:
    x, cross, inner, grad = (torch.randn(shape) for _ in range(4))
    alpha, beta = torch.randn(shape[-1]), torch.randn(shape[-1])
    skip = (0, shape[1] // 2) if shape[1] > 1 else ()
    leaves = [t.double().requires_grad_() for t in (cross, inner, alpha, beta)]
    expected = reference.prompt(x.double(), *leaves, skip)
    gradients = torch.autograd.grad(expected, leaves, grad.double())
    found = cpu.prompt(x, cross, inner, alpha, beta, skip)
    assert relative(found, expected) < 2e-6
    for t in skip:
        assert torch.equal(found[:, t], x[:, t])
    for value, true in zip(
        cpu.prompt_backward(grad, cross, inner, alpha, beta, skip), gradients, strict=True
    ):
        assert relative(value, true) < 2e-6


def test_prompt_with_zero_scales_is_the_identity_bit_for_bit() -> None:
    x, other = torch.randn(2, 9, 48), torch.randn(2, 9, 48)
    x[0, 0, :3] = torch.tensor([1e-40, -1e-40, 3e38])
    zero = torch.zeros(48)
    assert torch.equal(cpu.prompt(x, other, other, zero, zero, (4,)), x)


def test_auto_takes_the_kernels_for_float32_and_the_reference_for_float64() -> None:
    assert backends.choose("auto", CPU, torch.float32) == "cpu"
    assert backends.choose("auto", CPU, torch.float64) == "reference"
    with pytest.raises(BackendError, match="it computes in float32"):
        backends.choose("cpu", CPU, torch.float64)
    assert "run on a CPU" in cpu.unavailable(torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instruction_sets_give_the_same_numbers(capability: str) -> None:
    """This very file's first test again, with the code that an older processor gets."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("the instruction set is already chosen by ATEN_CPU_CAPABILITY")
    tests = [
        f"{__file__}::{test.__name__}"
        for test in (
            test_scan_and_all_its_gradients_match_float64,
            test_decay_is_exact_to_the_last_digits_over_its_whole_range,
            test_softplus_keeps_its_digits_from_minus_80_to_100,
            test_a_nan_goes_where_the_formula_takes_it_and_nowhere_else,
            test_silu_of_an_extreme_value_is_pytorchs,
        )
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
