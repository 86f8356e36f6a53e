"""The forward and the backward pass of the mixer, composed of a backend's kernels and products.

The forward pass returns, beside its output, what the backward pass reads again; what is left out
there is recomputed:

    keep = 0   nothing                      inference
    keep = 1   x_dbl, y                     y, the sum of the scans, spares a scan for dz
    keep = 2   x_dbl, y, xz, u              also spares in_proj and the convolutions
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from svp_peft.ops.backends import kernels
from svp_peft.ops.casting import cast
from svp_peft.ops.types import MixerWeights, ScanNeeds


def pack(w: MixerWeights) -> tuple[Tensor | None, ...]:
    """The tensors in the order of the op's arguments; a missing direction or bias is None."""

    def two(pair: tuple[Tensor, ...] | None) -> tuple[Tensor | None, Tensor | None]:
        if pair is None:
            return None, None
        return pair[0], pair[1] if len(pair) == 2 else None

    return (
        w.in_proj_weight,
        w.in_proj_bias,
        *two(w.conv_weight),
        *two(w.conv_bias),
        *two(w.x_proj_weight),
        *two(w.dt_weight),
        *two(w.dt_bias),
        *two(w.A_log),
        *two(w.D),
        w.out_proj_weight,
        w.out_proj_bias,
    )


def unpack(flat: tuple[Any, ...]) -> MixerWeights:
    """The inverse of `pack`."""

    def pair(i: int) -> tuple[Any, ...]:
        return (flat[i],) if flat[i + 1] is None else (flat[i], flat[i + 1])

    return MixerWeights(
        in_proj_weight=flat[0],
        in_proj_bias=flat[1],
        conv_weight=pair(2),
        conv_bias=None if flat[4] is None else pair(4),
        x_proj_weight=pair(6),
        dt_weight=pair(8),
        dt_bias=pair(10),
        A_log=pair(12),
        D=pair(14),
        out_proj_weight=flat[16],
        out_proj_bias=flat[17],
    )


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(rows, in) -> (rows, out) in `dtype`."""
    if bias is None:
        return torch.mm(rows, cast(weight, dtype).T)
    return torch.addmm(cast(bias, dtype), rows, cast(weight, dtype).T)


def _in_projection(hidden: Tensor, w: MixerWeights, dtype: torch.dtype) -> Tensor:
    """xz, (batch, L, 2 * d_inner)."""
    rows = hidden.to(dtype).reshape(-1, hidden.shape[-1])
    xz = _linear(rows, w.in_proj_weight, w.in_proj_bias, dtype)
    return xz.view(*hidden.shape[:2], xz.shape[-1])


def _convolve(xz: Tensor, w: MixerWeights, backend: str) -> tuple[Tensor, ...]:
    """u per convolution, (batch, L, d_inner)."""
    x = xz[..., : xz.shape[-1] // 2]
    return kernels(backend).conv_silu(x, w.conv_weight, w.conv_bias, w.conv_reverse)


def _scan_arguments(
    u: tuple[Tensor, ...], x_dbl: Tensor, w: MixerWeights
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(u, dt, B, C) and (A_log, D, dt_weight, dt_bias), each per scan; dt, B, C view x_dbl."""
    dt_rank, d_state = w.dt_weight[0].shape[1], w.A_log[0].shape[1]
    pick = w.source_of_direction
    activations = (
        tuple(u[k] for k in pick),
        tuple(x_dbl[k, ..., :dt_rank] for k in pick),
        tuple(x_dbl[k, ..., dt_rank : dt_rank + d_state] for k in pick),
        tuple(x_dbl[k, ..., dt_rank + d_state :] for k in pick),
    )
    parameters = (
        w.A_log,
        tuple(w.D[k] for k in pick),
        tuple(w.dt_weight[k] for k in pick),
        tuple(w.dt_bias[k] for k in pick),
    )
    return activations, parameters


def forward_pass(hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """(out, x_dbl, y, xz, u, u of the second convolution); what `keep` leaves out is empty."""
    *tensors, scale, dtype, backend, keep = arguments
    w = unpack(tuple(tensors))
    batch, length, _ = hidden.shape
    with torch.autocast(hidden.device.type, enabled=False):
        xz = _in_projection(hidden, w, dtype)
        u = _convolve(xz, w, backend)
        d_inner = xz.shape[-1] // 2
        x_dbl = xz.new_empty(len(u), batch, length, w.x_proj_weight[0].shape[0])
        for k, u_k in enumerate(u):
            weight = cast(w.x_proj_weight[k], dtype)
            torch.mm(u_k.view(-1, d_inner), weight.T, out=x_dbl[k].flatten(0, 1))
        activations, parameters = _scan_arguments(u, x_dbl, w)
        gated, y = kernels(backend).scan(
            *activations,
            xz[..., d_inner:],
            *parameters,
            reverse=w.scan_reverse,
            softplus=True,
            scale=scale,
            save_y=keep > 0,
        )
        out = _linear(gated.view(-1, d_inner), w.out_proj_weight, w.out_proj_bias, dtype)
    return (
        out.view(batch, length, out.shape[-1]),
        x_dbl if keep else xz.new_empty(0),
        y if keep else xz.new_empty(0),
        xz if keep == 2 else xz.new_empty(0),
        u[0] if keep == 2 else xz.new_empty(0),
        u[1] if keep == 2 and len(u) == 2 else xz.new_empty(0),
    )


def backward_pass(
    grad: Tensor, hidden: Tensor, needs: list[bool], saved: list[Tensor], *arguments: Any
) -> list[Tensor]:
    """The gradients asked for by `needs` (of hidden, then of each tensor), in that order."""
    *tensors, scale, dtype, backend, _ = arguments
    w = unpack(tuple(tensors))
    # a missing tensor needs no gradient, so pairs keep their shape through None
    flags = tuple(None if t is None else n for t, n in zip(tensors, needs[1:], strict=True))
    need: Any = unpack(flags)
    need_xz = bool(needs[0] or need.in_proj_weight or need.in_proj_bias)
    need_u = need_xz or any(need.conv_weight) or any(need.conv_bias or ())
    need_x_dbl = need_u or any(need.x_proj_weight)
    library = kernels(backend)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    batch, length, d_model = hidden.shape
    with torch.autocast(hidden.device.type, enabled=False):
        x_dbl, y, xz, *u_saved = saved
        rows = hidden.to(dtype).reshape(-1, d_model)
        if xz.numel() == 0 and hidden.numel() > 0:
            xz = _in_projection(hidden, w, dtype)
            u = _convolve(xz, w, backend)
        else:
            u = tuple(u_saved[: len(w.conv_weight)])
        d_inner = xz.shape[-1] // 2
        x, z = xz[..., :d_inner], xz[..., d_inner:]
        grad_rows = grad.to(dtype).reshape(-1, grad.shape[-1])

        d_out_weight: Any = None
        d_out_bias: Any = None
        if need.out_proj_weight:
            gated = (y.to(sum_dtype) * F.silu(z.to(sum_dtype)) * scale).to(dtype)
            d_out_weight = torch.mm(grad_rows.T, gated.view(-1, d_inner))
        if need.out_proj_bias:
            d_out_bias = grad_rows.sum(0, dtype=sum_dtype)

        d_gated = torch.mm(grad_rows, cast(w.out_proj_weight, dtype)).view(batch, length, d_inner)
        activations, parameters = _scan_arguments(u, x_dbl, w)
        d_xz = torch.empty_like(xz) if need_xz else None
        num_scans = len(w.A_log)
        d_x_dbl = x_dbl.new_empty(num_scans, *x_dbl.shape[1:]) if need_x_dbl else None
        grads = library.scan_backward(
            d_gated,
            *activations,
            z,
            y,
            *parameters,
            reverse=w.scan_reverse,
            softplus=True,
            scale=scale,
            dz_out=None if d_xz is None else d_xz[..., d_inner:],
            dx_dbl_out=None if d_x_dbl is None else tuple(d_x_dbl),
            need=ScanNeeds(
                u=need_u,
                dt=need_x_dbl,
                B=need_x_dbl,
                C=need_x_dbl,
                z=need_xz,
                A=any(need.A_log),
                D=any(need.D),
                dt_weight=any(need.dt_weight),
                dt_bias=any(need.dt_bias),
            ),
        )

        # v1: two scans read one convolution, so their gradients add up
        d_u = _per_convolution(grads.du, w)
        d_low = None if d_x_dbl is None else _per_convolution(tuple(d_x_dbl), w)
        d_x_proj: list[Any] = [None] * len(u)
        for k, u_k in enumerate(u):
            if d_low is None:
                break
            low_rows = d_low[k].flatten(0, 1)
            if need.x_proj_weight[k]:
                d_x_proj[k] = torch.mm(low_rows.T, u_k.view(-1, d_inner))
            if d_u is not None:
                d_u[k].view(-1, d_inner).addmm_(low_rows, cast(w.x_proj_weight[k], dtype))

        d_taps = d_conv_bias = None
        if d_u is not None:
            _, d_taps, d_conv_bias = library.conv_silu_backward(
                d_u,
                x,
                w.conv_weight,
                w.conv_bias,
                w.conv_reverse,
                dx_out=None if d_xz is None else d_xz[..., :d_inner],
                need_x=need_xz,
                need_weight=any(need.conv_weight),
                need_bias=any(need.conv_bias or ()),
            )
        d_hidden: Any = None
        d_in_weight: Any = None
        d_in_bias: Any = None
        if d_xz is not None:
            xz_rows = d_xz.flatten(0, 1)
            if needs[0]:
                d_hidden = torch.mm(xz_rows, cast(w.in_proj_weight, dtype)).view(hidden.shape)
            if need.in_proj_weight:
                d_in_weight = torch.mm(xz_rows.T, rows)
            if need.in_proj_bias:
                d_in_bias = xz_rows.sum(0, dtype=sum_dtype)

    absent: Any = (None, None)
    found: Any = MixerWeights(
        d_in_weight,
        d_in_bias,
        d_taps or absent,
        d_conv_bias or absent,
        tuple(d_x_proj),
        _per_convolution(grads.ddt_weight, w) or absent,
        _per_convolution(grads.ddt_bias, w) or absent,
        grads.dA or absent,
        _per_convolution(grads.dD, w) or absent,
        d_out_weight,
        d_out_bias,
    )
    everything: Any = (d_hidden, *pack(found))
    originals = (hidden, *tensors)
    return [
        gradient.to(original.dtype)
        for gradient, original, wanted in zip(everything, originals, needs, strict=True)
        if wanted
    ]


def _per_convolution(
    per_scan: tuple[Tensor, ...] | None, w: MixerWeights
) -> tuple[Tensor, ...] | None:
    if per_scan is None or len(per_scan) == len(w.conv_weight):
        return per_scan
    return (per_scan[0] + per_scan[1],)
