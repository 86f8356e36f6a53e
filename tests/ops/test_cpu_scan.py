"""The C++ scan against the reference in float64: values, gradients, edges of the ranges.

Tolerances: see cpu_cases.py.
"""

import pytest
import torch
from torch import Tensor

from svp_peft.errors import InputError
from svp_peft.ops import cpu, reference
from svp_peft.ops.types import ScanNeeds
from tests.ops.cpu_cases import (
    arguments,
    assert_gradients,
    backward,
    options,
    relative,
    scan_inputs,
    single,
    truth,
)

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    cpu.unavailable(CPU) is not None, reason=f"no C++ kernels: {cpu.unavailable(CPU)}"
)

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


def test_an_empty_batch_gives_an_empty_result() -> None:
    inputs = single(scan_inputs(0, 5, 24, 16, 3))
    out, y = cpu.scan(*arguments(inputs), save_y=True, **options(inputs))
    assert out.shape == y.shape == (0, 5, 24)
    grads = backward(inputs, torch.randn(0, 5, 24), y)
    assert grads.du[0].shape == (0, 5, 24)
    assert torch.equal(grads.dD[0], torch.zeros(24))
