"""The kernel interface of a backend, made from the reference by autograd: slow and exact.

It stands in for a compiled backend where a test is about what is composed of the kernels.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from svp_peft.ops import reference
from svp_peft.ops.types import ScanGrads, ScanNeeds


def differentiating(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` in a thread of its own: inside an op, autograd is off for the op's thread."""

    @wraps(function)
    def elsewhere(*args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function, *args, **kwargs).result()

    return elsewhere


def unavailable(device: torch.device) -> str | None:
    return None


def conv_silu(x, weight, bias, reverse):
    with torch.no_grad():
        taps = tuple(w.reshape(w.shape[0], -1) for w in weight)
        return reference.conv_silu(x, taps, bias, reverse)


@differentiating
def conv_silu_backward(
    grads, x, weight, bias, reverse, *, dx_out=None, need_x, need_weight, need_bias
):
    with torch.enable_grad():
        leaf_x = x.detach().requires_grad_()
        leaf_w = [w.detach().requires_grad_() for w in weight]
        leaf_b = [b.detach().requires_grad_() for b in bias or ()]
        out = reference.conv_silu(leaf_x, leaf_w, leaf_b or None, reverse)
        found = torch.autograd.grad(out, [leaf_x, *leaf_w, *leaf_b], grads)
    dx = found[0]
    if dx_out is not None:
        dx = dx_out.copy_(dx)
    count = len(weight)
    return (
        dx if need_x else None,
        tuple(found[1 : 1 + count]) if need_weight else None,
        tuple(found[1 + count :]) if need_bias else None,
    )


def scan(u, dt, B, C, z, A_log, D, dt_weight, dt_bias, *, save_y, **options):
    with torch.no_grad():
        out, y = reference.scan(u, dt, B, C, z, A_log, D, dt_weight, dt_bias, **options)
    return out.contiguous(), y if save_y else None


@differentiating
def scan_backward(
    grad_out,
    u,
    dt,
    B,
    C,
    z,
    y,
    A_log,
    D,
    dt_weight,
    dt_bias,
    *,
    dz_out=None,
    dx_dbl_out=None,
    need: ScanNeeds,
    **options,
) -> ScanGrads:
    def leaves(group: Sequence[Tensor] | None) -> list[Tensor] | None:
        return None if group is None else [t.detach().requires_grad_() for t in group]

    groups = [leaves(g) for g in (u, dt, B, C, None if z is None else [z])]
    groups += [leaves(g) for g in (A_log, D, dt_weight, dt_bias)]
    with torch.enable_grad():
        u, dt, B, C, gate, A_log, D, dt_weight, dt_bias = groups
        out, _ = reference.scan(
            u, dt, B, C, gate and gate[0], A_log, D, dt_weight, dt_bias, **options
        )
        flat = [t for g in groups if g is not None for t in g]
        found = iter(torch.autograd.grad(out, flat, grad_out))
    gradients = [None if g is None else tuple(next(found) for _ in g) for g in groups]
    gradients = [g if wanted else None for g, wanted in zip(gradients, need, strict=True)]
    if gradients[4] is not None:
        gradients[4] = gradients[4][0] if dz_out is None else dz_out.copy_(gradients[4][0])
    if dx_dbl_out is not None:
        for k, buffer in enumerate(dx_dbl_out):
            buffer.copy_(torch.cat([gradients[i][k] for i in (1, 2, 3)], dim=-1))
    return ScanGrads(*gradients)


def add_norm(hidden, residual, weight, bias, *, eps, rms, residual_dtype):
    with torch.no_grad():
        y, total = reference.add_norm(
            hidden, residual, weight, bias, eps=eps, rms=rms, residual_dtype=residual_dtype
        )
        return y, total.clone()


@differentiating
def add_norm_backward(
    grad_y,
    grad_residual_out,
    residual_out,
    weight,
    *,
    eps,
    rms,
    need_weight,
    need_bias,
    hidden_dtype,
    residual_in_dtype,
):
    with torch.enable_grad():
        total = residual_out.detach().requires_grad_()
        scale = weight.detach().requires_grad_()
        shift = torch.zeros_like(scale).requires_grad_()
        y, _ = reference.add_norm(
            total, None, scale, shift, eps=eps, rms=rms, residual_dtype=total.dtype
        )
        d_total, d_weight, d_bias = torch.autograd.grad(y, [total, scale, shift], grad_y)
    if grad_residual_out is not None:
        d_total = d_total + grad_residual_out
    return (
        d_total.to(hidden_dtype),
        None if residual_in_dtype is None else d_total.to(residual_in_dtype),
        d_weight if need_weight else None,
        d_bias if need_bias else None,
    )


def prompt(x, cross, inner, alpha, beta, skip):
    with torch.no_grad():
        return reference.prompt(x, cross, inner, alpha, beta, skip)


@differentiating
def prompt_backward(grad, cross, inner, alpha, beta, skip):
    with torch.enable_grad():
        leaf = [t.detach().requires_grad_() for t in (cross, inner, alpha, beta)]
        out = reference.prompt(torch.zeros_like(cross), *leaf, skip)
        return torch.autograd.grad(out, leaf, grad)
