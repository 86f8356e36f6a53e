"""The Triton kernels against the reference in float64: what the CPU's and the GPU's tests share."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from svp_peft.ops import reference, triton
from svp_peft.ops.types import ScanGrads, ScanNeeds
from tests.ops.cuda_cases import EVERY_GRADIENT, Case, error, scan_truth

Bounds = Mapping[torch.dtype, float]


def check_scan(case: Case, bounds: Bounds) -> None:
    """out and y, and that y costs nothing where it is not saved."""
    out, y = triton.scan(*case.arguments, **case.options, save_y=True)
    true_out, true_y, _ = scan_truth(case)
    assert error(out, true_out) < bounds[out.dtype]
    assert error(y, true_y) < bounds[out.dtype]
    alone, nothing = triton.scan(*case.arguments, **case.options, save_y=False)
    assert nothing is None
    assert torch.equal(alone, out)


def scan_gradients(case: Case, need: ScanNeeds, y: Tensor | None = None, **views: Any) -> ScanGrads:
    first, rest = case.arguments[:5], case.arguments[5:]
    return triton.scan_backward(case.grad_out, *first, y, *rest, **case.options, need=need, **views)


def check_scan_gradients(case: Case, bounds: Bounds, need: ScanNeeds = EVERY_GRADIENT) -> None:
    """Those gradients that `need` asks for are right, and the others are None."""
    found = scan_gradients(case, need)._asdict()
    _, _, truth = scan_truth(case)
    for name, expected in truth.items():
        got = found[name]
        if not getattr(need, name[1:]) or expected is None:
            assert got is None, name
            continue
        pairs = ((got, expected),) if isinstance(got, Tensor) else zip(got, expected, strict=True)
        for k, (value, true_value) in enumerate(pairs):
            off = error(value, true_value)
            exact_zero = not true_value.any()
            assert not value.any() if exact_zero else off < bounds[case.grad_out.dtype], (
                f"{name} of direction {k}: {off:.1e}"
            )


def check_conv(
    batch: int,
    length: int,
    channels: int,
    reverse: Sequence[bool],
    dtype: torch.dtype,
    device: str,
    bounds: Bounds,
    width: int = 4,
    has_bias: bool = True,
) -> None:
    """Values and gradients on x and dx that are halves of wider tensors, as in the mixer."""
    xz = torch.randn(batch, length, 2 * channels).to(device, dtype)
    x = xz[..., :channels]
    weight = tuple(torch.randn(channels, width).to(device) for _ in reverse)
    bias = tuple(torch.randn(channels).to(device) for _ in reverse) if has_bias else None
    grads = tuple(torch.randn(batch, length, channels).to(device, dtype) for _ in reverse)
    leaves = [t.double().requires_grad_() for t in (x, *weight, *(bias or ()))]
    true_x, true_rest = leaves[0], leaves[1:]
    truth = reference.conv_silu(
        true_x, true_rest[: len(reverse)], true_rest[len(reverse) :] or None, reverse
    )
    expected = torch.autograd.grad(truth, leaves, [g.double() for g in grads])
    for value, true_value in zip(triton.conv_silu(x, weight, bias, reverse), truth, strict=True):
        assert value.is_contiguous()
        assert error(value, true_value) < bounds[dtype]
    d_xz = torch.full_like(xz, torch.nan)
    dx, d_weight, d_bias = triton.conv_silu_backward(
        grads, x, weight, bias, reverse,
        dx_out=d_xz[..., :channels], need_x=True, need_weight=True, need_bias=True,
    )  # fmt: skip
    assert d_xz[..., channels:].isnan().all()
    for value, true_value in zip((dx, *d_weight, *(d_bias or ())), expected, strict=True):
        assert error(value, true_value) < bounds[dtype]
    for need in ({"need_x": True}, {"need_weight": True}, {"need_bias": has_bias}):
        wanted = {"need_x": False, "need_weight": False, "need_bias": False} | need
        alone = triton.conv_silu_backward(grads, x, weight, bias, reverse, **wanted)
        assert [part is not None for part in alone] == list(wanted.values())
        for part, whole in zip(alone, (dx, d_weight, d_bias), strict=True):
            for a, b in zip(
                _several(part), _several(whole) if part is not None else (), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def check_add_norm(
    rows: int,
    d_model: int,
    dtype: torch.dtype,
    device: str,
    bounds: Bounds,
    *,
    rms: bool,
    has_residual: bool,
    residual_dtype: torch.dtype = torch.float32,
) -> None:
    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape).to(device, dtype)

    hidden, weight, bias = draw(2, rows, d_model), draw(d_model), draw(d_model)
    residual = draw(2, rows, d_model, dtype=residual_dtype) if has_residual else None
    grad, grad_total = draw(2, rows, d_model), draw(2, rows, d_model, dtype=residual_dtype)
    leaves = [
        None if t is None else t.double().requires_grad_() for t in (hidden, residual, weight, bias)
    ]
    truth = reference.add_norm(*leaves, eps=1e-5, rms=rms, residual_dtype=torch.float64)
    wanted = [t for t in leaves if t is not None]
    expected = torch.autograd.grad(truth, wanted, [grad.double(), grad_total.double()])
    y, total = triton.add_norm(
        hidden, residual, weight, bias, eps=1e-5, rms=rms, residual_dtype=residual_dtype
    )
    assert (y.dtype, total.dtype) == (dtype, residual_dtype)
    assert error(y, truth[0]) < bounds[dtype]
    assert error(total, truth[1]) < bounds[residual_dtype]
    found = triton.add_norm_backward(
        grad, grad_total, total, weight, eps=1e-5, rms=rms, need_weight=True, need_bias=True,
        hidden_dtype=dtype, residual_in_dtype=residual_dtype if has_residual else None,
    )  # fmt: skip
    assert (found[1] is None) == (not has_residual)
    given = [g for g in found if g is not None]
    for value, true_value in zip(given, expected, strict=True):
        assert error(value, true_value) < bounds[dtype]
    frozen = triton.add_norm_backward(
        grad, None, total, weight, eps=1e-5, rms=rms, need_weight=False, need_bias=False,
        hidden_dtype=dtype, residual_in_dtype=None,
    )  # fmt: skip
    only_y = torch.autograd.grad(
        reference.add_norm(*leaves, eps=1e-5, rms=rms, residual_dtype=torch.float64)[0],
        leaves[0],
        grad.double(),
    )[0]
    assert frozen[1:] == (None, None, None)
    assert error(frozen[0], only_y) < bounds[dtype]


def check_prompt(
    batch: int,
    length: int,
    d_model: int,
    skip: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    bounds: Bounds,
    *,
    has_cross: bool = True,
    has_inner: bool = True,
) -> None:
    def draw(wanted: bool, *shape: int, dtype: torch.dtype = dtype) -> Tensor | None:
        return torch.randn(*shape).to(device, dtype) if wanted else None

    x, grad = (draw(True, batch, length, d_model) for _ in range(2))
    inputs = (
        draw(has_cross, batch, length, d_model),
        draw(has_inner, batch, length, d_model),
        draw(has_cross, d_model, dtype=torch.float32),
        draw(has_inner, d_model, dtype=torch.float32),
    )
    leaves = [None if t is None else t.double().requires_grad_() for t in inputs]
    truth = reference.prompt(x.double(), *leaves, skip)
    wanted = [t for t in leaves if t is not None]
    expected = iter(torch.autograd.grad(truth, wanted, grad.double()))
    out = triton.prompt(x, *inputs, skip)
    assert error(out, truth) < bounds[dtype]
    assert torch.equal(out[:, list(skip)], x[:, list(skip)])
    found = triton.prompt_backward(grad, *inputs, skip)
    for value, given in zip(found, inputs, strict=True):
        assert (value is None) == (given is None)
        if value is not None:
            assert error(value, next(expected)) < bounds[dtype]


def _several(value: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, Tensor) else value
