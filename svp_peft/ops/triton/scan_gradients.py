"""Selective scan backward: exactly the gradients asked for."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from svp_peft.ops.casting import cast
from svp_peft.ops.triton.launch import (
    on_device,
    packed,
    pair,
    power_of_two,
    row_stride,
    step_sizes,
    with_equal_rows,
    with_rows,
)
from svp_peft.ops.triton.scan_forward import scan
from svp_peft.ops.triton.scan_gradient_kernels import (
    backward_kernel,
    gate_backward_kernel,
    sum_parts_kernel,
)
from svp_peft.ops.types import ScanGrads, ScanNeeds

# a launch takes as many images as this much scratch memory has room for; one image at least
_SCRATCH_BYTES = 1 << 30


def scan_backward(
    grad_out: Tensor,
    u: Sequence[Tensor],
    dt: Sequence[Tensor],
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    z: Tensor | None,
    y: Tensor | None,
    A_log: Sequence[Tensor],
    D: Sequence[Tensor] | None,
    dt_weight: Sequence[Tensor] | None,
    dt_bias: Sequence[Tensor] | None,
    *,
    reverse: Sequence[bool],
    softplus: bool,
    scale: float,
    A_is_log: bool = True,
    dz_out: Tensor | None = None,
    dx_dbl_out: Sequence[Tensor] | None = None,
    need: ScanNeeds,
) -> ScanGrads:
    """Gradients of `scan`.

    Args:
        grad_out: gradient of `out`, (batch, L, d_inner).
        y: the unscaled sum that `scan` returned, or None: it is then computed again if dz needs it.
        dz_out: (batch, L, d_inner), any row stride: where dz is written.
        dx_dbl_out: per direction (batch, L, dt_rank + 2 * d_state): where ddt, dB and dC are
            written side by side.
        need: which gradients are wanted; nothing else is computed or allocated.

    Returns:
        See `ScanGrads`; parameter gradients are float32. The same inputs give the same bits.
    """
    first = u[0]
    need = need._replace(
        z=need.z and z is not None,
        D=need.D and D is not None,
        dt_weight=need.dt_weight and dt_weight is not None,
        dt_bias=need.dt_bias and dt_bias is not None,
    )
    with on_device(first):
        u = [x.contiguous() for x in u]
        full = step_sizes(dt, dt_weight)
        if need.z and y is None:
            _, y = scan(
                u, full, B, C, None, A_log, D, None, dt_bias,
                reverse=reverse, softplus=softplus, scale=1.0, save_y=True, A_is_log=A_is_log,
            )  # fmt: skip
        through_scan = any(need._replace(z=False))
        dz, dy = _gate_backward(grad_out, z, y, scale, dz_out, need.z, through_scan)
        if not through_scan:
            return ScanGrads(None, None, None, None, dz, None, None, None, None)

        store_dt = need.dt or need.dt_weight
        du = _like(u, need.u)
        d_full = _like(full, store_dt)
        ddt, dB, dC = _targets(dt, B, C, d_full, dx_dbl_out, need, low=dt_weight is not None)
        dA, dD, ddt_bias = _sweeps(
            u, full, B, C, dy, A_log, D, dt_bias, du, d_full, dB, dC,
            reverse, softplus, A_is_log, need._replace(dt=store_dt),
        )  # fmt: skip
        ddt_weight = None
        if need.dt_weight and d_full is not None:
            ddt_weight = tuple(
                torch.mm(g.flatten(0, 1).T, x.flatten(0, 1)).float()
                for g, x in zip(d_full, dt, strict=True)
            )
        if ddt is not None and dt_weight is not None and d_full is not None:
            for target, g, weight in zip(ddt, d_full, dt_weight, strict=True):
                low_rank = target.view(-1, target.shape[2])
                torch.mm(g.flatten(0, 1), cast(weight, g.dtype).detach(), out=low_rank)
    return ScanGrads(du, ddt, dB, dC, dz, dA, dD, ddt_weight, ddt_bias)


def _targets(
    dt: Sequence[Tensor],
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    d_full: tuple[Tensor, ...] | None,
    dx_dbl_out: Sequence[Tensor] | None,
    need: ScanNeeds,
    low: bool,
) -> tuple[tuple[Tensor, ...] | None, ...]:
    """Where ddt, dB and dC are written; None where not wanted."""
    if dx_dbl_out is None:
        ddt = _like(dt, need.dt) if low else d_full
        return ddt, _like(B, need.B), _like(C, need.C)
    sizes = (dt[0].shape[2], B[0].shape[2], C[0].shape[2])
    columns = zip(*(x.split(sizes, dim=2) for x in dx_dbl_out), strict=True)
    wanted = (need.dt, need.B, need.C)
    return tuple(c if w else None for c, w in zip(columns, wanted, strict=True))


def _like(tensors: Sequence[Tensor], wanted: bool) -> tuple[Tensor, ...] | None:
    return tuple(x.new_empty(x.shape) for x in tensors) if wanted else None


def _gate_backward(
    grad_out: Tensor,
    z: Tensor | None,
    y: Tensor | None,
    scale: float,
    dz_out: Tensor | None,
    need_z: bool,
    need_y: bool,
) -> tuple[Tensor | None, Tensor]:
    """(dz, dy) of scale * y * silu(z)."""
    grad_out = grad_out.contiguous()
    if z is None:
        return None, grad_out if scale == 1.0 else grad_out * scale
    z, z_row = with_rows(z)
    dz = None
    if need_z:
        direct = dz_out is not None and row_stride(dz_out) is not None
        dz = dz_out if direct else z.new_empty(z.shape)
    target, dz_row = (z, z_row) if dz is None else with_rows(dz)
    dy = torch.empty_like(grad_out, dtype=torch.float32) if need_y else grad_out
    rows, d_inner = z.shape[0] * z.shape[1], z.shape[2]
    if rows and (need_y or need_z):
        gate_backward_kernel[triton.cdiv(rows, 8), triton.cdiv(d_inner, 128)](
            grad_out, grad_out if y is None else y.contiguous(), z, target, dy, rows, scale,
            z_row=z_row, dz_row=dz_row, d_inner=d_inner,
            NEED_Y=need_y, NEED_Z=need_z, BR=8, BD=128, num_warps=4,
        )  # fmt: skip
    if dz is not None and dz_out is not None and dz is not dz_out:
        dz = dz_out.copy_(dz)
    return dz, dy


def _sweeps(
    u: Sequence[Tensor],
    dt: Sequence[Tensor],
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    dy: Tensor,
    A_log: Sequence[Tensor],
    D: Sequence[Tensor] | None,
    dt_bias: Sequence[Tensor] | None,
    du: Sequence[Tensor] | None,
    ddt: Sequence[Tensor] | None,
    dB: Sequence[Tensor] | None,
    dC: Sequence[Tensor] | None,
    reverse: Sequence[bool],
    softplus: bool,
    A_is_log: bool,
    need: ScanNeeds,
) -> tuple[tuple[Tensor, ...] | None, ...]:
    """Write du, ddt, dB and dC; return (dA, dD, ddt_bias). dt and ddt are per channel."""
    K, (batch, length, d_inner), d_state = len(u), u[0].shape, A_log[0].shape[1]
    # never one: the interpreter of Triton 3.0 stores single elements in spite of their mask
    N = power_of_two(max(2, d_state))
    # by the registers that the states take
    BD = 32 if N <= (16 if need.A else 32) else 16
    parts = triton.cdiv(d_inner, BD)
    need_dt = need.dt or need.dt_bias
    states, bc_row = with_equal_rows((*B, *C))
    B, C = states[:K], states[K:]
    parameters = (*pair(packed(A_log), dy), *pair(packed(D), dy), *pair(packed(dt_bias), dy))

    def scratch(wanted: bool, *shape: int) -> Tensor:
        return dy.new_empty(shape if wanted else (1,), dtype=torch.float32)

    need_G = need_dt and not need.A
    per_image = 4 * K * length * (need_G * d_inner + (need.B + need.C) * parts * d_state)
    per_image += 4 * K * triton.cdiv(length, 4) * d_inner * d_state * need.A
    images = max(1, min(batch, _SCRATCH_BYTES // max(1, per_image)))
    G = scratch(need_G, K * images * length * d_inner)
    shares_B = scratch(need.B, parts * K * images * length * d_state)
    shares_C = scratch(need.C, parts * K * images * length * d_state)
    wanted = (need.A, need.D, need.dt_bias)
    shapes = ((d_inner, d_state), (d_inner,), (d_inner,))
    starts = scratch(need.A, K * images * triton.cdiv(length, 4) * d_inner * d_state)
    sums = [dy.new_zeros(K, *x, dtype=torch.float32) for x in shapes]
    for begin in range(0, batch if length else 0, images):
        end = min(begin + images, batch)
        shares = [scratch(w, K, end - begin, *x) for w, x in zip(wanted, shapes, strict=True)]

        def piece(tensors: Sequence[Tensor] | None, a: int = begin, b: int = end) -> list[Tensor]:
            return list(pair([x[a:b] for x in tensors] if tensors else None, dy))

        backward_kernel[end - begin, parts, K](
            *piece(u), *piece(dt), *piece(B), *piece(C), *parameters, dy[begin:end], G,
            *piece(du), *piece(ddt), shares_B, shares_C, starts, *shares,
            length, (end - begin) * length,
            bc_row=bc_row, d_inner=d_inner, d_state=d_state, K=K,
            REVERSE0=bool(reverse[0]), REVERSE1=bool(reverse[-1]),
            SOFTPLUS=softplus, A_IS_LOG=A_is_log, HAS_D=D is not None, HAS_BIAS=dt_bias is not None,
            NEED_U=need.u, NEED_DT=need_dt, STORE_DT=need.dt, NEED_G=need_G,
            NEED_B=need.B, NEED_C=need.C, NEED_A=need.A, NEED_D=need.D, NEED_BIAS=need.dt_bias,
            BD=BD, N=N, num_warps=1,
        )  # fmt: skip
        if need.B and dB is not None:
            _sum_parts(shares_B, [x[begin:end] for x in dB], parts)
        if need.C and dC is not None:
            _sum_parts(shares_C, [x[begin:end] for x in dC], parts)
        for total, share, w in zip(sums, shares, wanted, strict=True):
            if w:
                total += share.sum(1)
    return tuple(total.unbind() if w else None for total, w in zip(sums, wanted, strict=True))


def _sum_parts(shares: Tensor, targets: Sequence[Tensor], parts: int) -> None:
    """targets[k] = sum over parts of shares (parts, K, rows, d_state), in a fixed order."""
    batch, length, d_state = targets[0].shape
    K, rows = len(targets), batch * length
    written, sum_row = with_equal_rows(targets)
    sum_parts_kernel[triton.cdiv(rows, 32), K](
        shares, *pair(written, shares), rows,
        sum_row=sum_row, d_state=d_state, K=K, parts=parts, BR=32, N=power_of_two(max(2, d_state)),
        num_warps=4,
    )  # fmt: skip
    for target, source in zip(targets, written, strict=True):
        if source is not target:
            target.copy_(source)
