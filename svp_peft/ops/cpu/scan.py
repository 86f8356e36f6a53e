"""The selective scan in C++: csrc/scan_forward.cpp and csrc/scan_backward.cpp; float32."""

from collections.abc import Sequence

import torch
from torch import Tensor

from svp_peft.ops.cpu.call import Call, at
from svp_peft.ops.types import ScanGrads, ScanNeeds

PerDirection = Sequence[Tensor]


def scan(
    u: PerDirection,
    dt: PerDirection,
    B: PerDirection,
    C: PerDirection,
    z: Tensor | None,
    A_log: PerDirection,
    D: PerDirection | None,
    dt_weight: PerDirection | None,
    dt_bias: PerDirection | None,
    *,
    reverse: Sequence[bool],
    softplus: bool,
    scale: float,
    A_is_log: bool = True,
    save_y: bool,
) -> tuple[Tensor, Tensor | None]:
    """`svp_peft.ops.reference.scan`, without a derivative; y is None unless `save_y`."""
    shape = u[0].shape
    out = u[0].new_empty(shape)
    y = u[0].new_empty(shape) if save_y else None
    if out.numel() == 0:
        return out, y
    call = Call()
    _inputs(call, u, dt, B, C, A_log, D, dt_weight, dt_bias, reverse, softplus, A_is_log)
    call.rows(z)
    call.rows(out)
    call.rows(y)
    call.run("svp_scan_forward", scale)
    return out, y


def scan_backward(
    grad_out: Tensor,
    u: PerDirection,
    dt: PerDirection,
    B: PerDirection,
    C: PerDirection,
    z: Tensor | None,
    y: Tensor | None,
    A_log: PerDirection,
    D: PerDirection | None,
    dt_weight: PerDirection | None,
    dt_bias: PerDirection | None,
    *,
    reverse: Sequence[bool],
    softplus: bool,
    scale: float,
    A_is_log: bool = True,
    dz_out: Tensor | None = None,
    dx_dbl_out: Sequence[Tensor] | None = None,
    need: ScanNeeds,
) -> ScanGrads:
    """The gradients that `need` names, of a loss whose gradient by `out` is `grad_out`.

    Args:
        y: what `scan` returned; None computes it again where dz is wanted.
        dz_out: (batch, L, d_inner) view that dz is written into.
        dx_dbl_out: per direction, (batch, L, dt_rank + 2 d_state) that ddt, dB and dC are written
            into, side by side; they are then views of it.
    """
    directions, shape = len(u), u[0].shape
    batch, length, d_inner = shape
    d_state = A_log[0].shape[1]
    new = u[0].new_empty
    need_z = need.z and z is not None
    if need_z and y is None:
        y, _ = scan(
            u, dt, B, C, None, A_log, D, dt_weight, dt_bias,
            reverse=reverse, softplus=softplus, scale=1.0, A_is_log=A_is_log, save_y=False,
        )  # fmt: skip

    def each(wanted: bool, *size: int) -> tuple[Tensor, ...] | None:
        return tuple(new(size) for _ in range(directions)) if wanted else None

    low_rank = dt_weight is not None
    need_D, need_bias = need.D and D is not None, need.dt_bias and dt_bias is not None
    du = each(need.u, batch, length, d_inner)
    dz = (new(shape) if dz_out is None else dz_out) if need_z else None
    dA = each(need.A, d_inner, d_state)
    dD = each(need_D, d_inner)
    d_bias = each(need_bias, d_inner)
    # the softplus' argument at every step, which the kernel replaces by its gradient
    d_delta = each(True, batch, length, d_inner) or ()
    if dx_dbl_out is None:
        dB = each(need.B, batch, length, d_state)
        dC = each(need.C, batch, length, d_state)
        ddt = each(need.dt, batch, length, dt[0].shape[2]) if low_rank else d_delta
    else:
        widths = (dt[0].shape[2], d_state, d_state)
        ddt, dB, dC = zip(*(low.split(widths, dim=-1) for low in dx_dbl_out), strict=True)

    call = Call()
    _inputs(call, u, dt, B, C, A_log, D, dt_weight, dt_bias, reverse, softplus, A_is_log)
    for k in (0, directions - 1):
        for group in (du, dB if need.B else None, dC if need.C else None, d_delta):
            call.rows(at(group, k))
        call.parameters(at(dA, k), at(dD, k), at(d_bias, k))
    for tensor in (grad_out, z, y if need_z else None, dz):
        call.rows(tensor)
    call.run("svp_scan_backward", scale)

    d_weight = []
    for k, weight in enumerate(dt_weight or ()):
        flat = d_delta[k].view(batch * length, d_inner)
        if need.dt and ddt is not None:
            rows = ddt[k].view(batch * length, weight.shape[1])
            torch.mm(flat, weight.to(torch.float32), out=rows)
        if need.dt_weight:
            d_weight.append(torch.mm(flat.T, dt[k].reshape(batch * length, weight.shape[1])))
    return ScanGrads(
        du=du,
        ddt=ddt if need.dt else None,
        dB=dB if need.B else None,
        dC=dC if need.C else None,
        dz=dz,
        dA=dA,
        dD=dD,
        ddt_weight=tuple(d_weight) or None,
        ddt_bias=d_bias,
    )


def _inputs(
    call: Call,
    u: PerDirection,
    dt: PerDirection,
    B: PerDirection,
    C: PerDirection,
    A_log: PerDirection,
    D: PerDirection | None,
    dt_weight: PerDirection | None,
    dt_bias: PerDirection | None,
    reverse: Sequence[bool],
    softplus: bool,
    A_is_log: bool,
) -> None:
    """The fields of Shape and of both Directions; a missing second one repeats the first."""
    batch, length, d_inner = u[0].shape
    rank = 0 if dt_weight is None else dt_weight[0].shape[1]
    call.numbers(batch, length, d_inner, A_log[0].shape[1], rank, len(u), softplus, A_is_log)
    for k in (0, len(u) - 1):
        for tensor in (u[k], dt[k], B[k], C[k]):
            call.rows(tensor)
        call.parameters(A_log[k], at(D, k), at(dt_weight, k), at(dt_bias, k))
        call.numbers(reverse[k])
