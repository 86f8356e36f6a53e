"""Selective scan forward: kernels for large and for small batches, and their launcher."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from svp_peft.ops.triton.launch import (
    on_device,
    packed,
    pair,
    power_of_two,
    step_sizes,
    with_equal_rows,
    with_rows,
)
from svp_peft.ops.triton.scan_kernels import (
    channel_vector,
    scaled_rates,
    state_vector,
    step_size,
)

# up to this many programs of the sequential kernel the GPU stays mostly idle, and a parallel scan
# over tiles of the sequence finishes earlier. On an H100, Vim-Small: 0.024 against 0.060 ms at
# batch 1 (48 programs), 0.099 against 0.061 ms at batch 8 (384 programs)
_FEW_PROGRAMS = 192
_TILE = 32


@triton.jit
def _inputs(u, dt, B, C, row, col, n, d_inner, bc_row, d_state: tl.constexpr, N: tl.constexpr):
    """One token: u, dt [BD] and B, C [N]."""
    b_u = tl.load(u + row * d_inner + col).to(tl.float32)
    b_dt = tl.load(dt + row * d_inner + col).to(tl.float32)
    b_B = state_vector(B + row * bc_row, n, d_state, N)
    b_C = state_vector(C + row * bc_row, n, d_state, N)
    return b_u, b_dt, b_B, b_C


@triton.jit
def _step(h, u, dt, B, C, A, D, bias, y, mask, SOFTPLUS: tl.constexpr):
    """h_t from h_{t-1}, [N, BD]; stores y_t."""
    delta, _ = step_size(dt, bias, SOFTPLUS)
    h = tl.exp2(delta[None, :] * A) * h + (delta * u)[None, :] * B[:, None]
    b_y = tl.sum(h * C[:, None], 0) + D * u
    tl.store(y, b_y.to(y.dtype.element_ty), mask=mask)
    return h


@triton.jit(do_not_specialize=["L", "rows"])
def _sequential_kernel(
    u0, u1, dt0, dt1,  # [rows, d_inner]
    B0, B1, C0, C1,  # [rows, d_state], rows bc_row apart
    A0, A1,  # [d_inner, d_state]
    D0, D1, bias0, bias1,  # [d_inner]
    y,  # [K, rows, d_inner]
    L, rows,
    bc_row: tl.constexpr, d_inner: tl.constexpr, d_state: tl.constexpr,
    REVERSE0: tl.constexpr, REVERSE1: tl.constexpr,
    SOFTPLUS: tl.constexpr, A_IS_LOG: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    BD: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """y of one direction, step by step.

    The states are the first axis of every tile: a lane then owns a channel with all its states, and
    the sum over the states needs no exchange between lanes.
    """
    direction = tl.program_id(2)
    if direction == 0:
        u, dt, B, C = u0, dt0, B0, C0
        A_log, D, bias, reverse = A0, D0, bias0, REVERSE0
    else:
        u, dt, B, C = u1, dt1, B1, C1
        A_log, D, bias, reverse = A1, D1, bias1, REVERSE1
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = channel < d_inner
    col = tl.minimum(channel, d_inner - 1)
    n = tl.arange(0, N)
    # int64: rows * d_inner overflows int32 at batch 128 with 21,845 tokens of width 768
    y += direction.to(tl.int64) * rows * d_inner
    first = tl.program_id(0).to(tl.int64) * L + tl.where(reverse, L - 1, 0)
    sign = tl.where(reverse, -1, 1)
    # the minimum also hides from Triton that n is contiguous: it would give a lane four states of
    # this load and of everything after it
    known = tl.minimum(n, d_state - 1)
    b_A = scaled_rates(A_log, col[None, :], known[:, None], d_state, A_IS_LOG)
    b_D = channel_vector(D, col, HAS_D)
    b_bias = channel_vector(bias, col, HAS_BIAS)
    h = tl.zeros((N, BD), tl.float32)
    for s in range(0, L, 4):
        # four steps are read before the first is used, so that their latencies overlap
        r0 = first + sign * s
        r1 = first + sign * tl.minimum(s + 1, L - 1)
        r2 = first + sign * tl.minimum(s + 2, L - 1)
        r3 = first + sign * tl.minimum(s + 3, L - 1)
        b_u0, b_dt0, b_B0, b_C0 = _inputs(u, dt, B, C, r0, col, n, d_inner, bc_row, d_state, N)
        b_u1, b_dt1, b_B1, b_C1 = _inputs(u, dt, B, C, r1, col, n, d_inner, bc_row, d_state, N)
        b_u2, b_dt2, b_B2, b_C2 = _inputs(u, dt, B, C, r2, col, n, d_inner, bc_row, d_state, N)
        b_u3, b_dt3, b_B3, b_C3 = _inputs(u, dt, B, C, r3, col, n, d_inner, bc_row, d_state, N)
        y0 = y + r0 * d_inner + col
        y1 = y + r1 * d_inner + col
        y2 = y + r2 * d_inner + col
        y3 = y + r3 * d_inner + col
        h = _step(h, b_u0, b_dt0, b_B0, b_C0, b_A, b_D, b_bias, y0, inside, SOFTPLUS)
        here = inside & (s + 1 < L)
        h = _step(h, b_u1, b_dt1, b_B1, b_C1, b_A, b_D, b_bias, y1, here, SOFTPLUS)
        here = inside & (s + 2 < L)
        h = _step(h, b_u2, b_dt2, b_B2, b_C2, b_A, b_D, b_bias, y2, here, SOFTPLUS)
        here = inside & (s + 3 < L)
        h = _step(h, b_u3, b_dt3, b_B3, b_C3, b_A, b_D, b_bias, y3, here, SOFTPLUS)


@triton.jit
def _compose(a1, b1, a2, b2):
    """h -> a2 (a1 h + b1) + b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit(do_not_specialize=["L", "rows"])
def _parallel_kernel(
    u0, u1, dt0, dt1, B0, B1, C0, C1, A0, A1, D0, D1, bias0, bias1, y,  # as above
    L, rows,
    bc_row: tl.constexpr, d_inner: tl.constexpr, d_state: tl.constexpr,
    REVERSE0: tl.constexpr, REVERSE1: tl.constexpr,
    SOFTPLUS: tl.constexpr, A_IS_LOG: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    BD: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y of one direction, TILE steps at a time by a parallel scan."""
    direction = tl.program_id(2)
    if direction == 0:
        u, dt, B, C = u0, dt0, B0, C0
        A_log, D, bias, reverse = A0, D0, bias0, REVERSE0
    else:
        u, dt, B, C = u1, dt1, B1, C1
        A_log, D, bias, reverse = A1, D1, bias1, REVERSE1
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = channel < d_inner
    col = tl.minimum(channel, d_inner - 1)
    n = tl.arange(0, N)
    step = tl.arange(0, TILE)
    y += direction.to(tl.int64) * rows * d_inner
    first = tl.program_id(0).to(tl.int64) * L + tl.where(reverse, L - 1, 0)
    sign = tl.where(reverse, -1, 1)
    b_A = scaled_rates(A_log, col[:, None], tl.minimum(n, d_state - 1)[None, :], d_state, A_IS_LOG)
    b_D = channel_vector(D, col, HAS_D)
    b_bias = channel_vector(bias, col, HAS_BIAS)
    h = tl.zeros((BD, N), tl.float32)
    for s0 in range(0, L, TILE):
        s = s0 + step
        row = (first + sign * tl.minimum(s, L - 1))[:, None]  # [TILE, 1]
        known = n[None, :] < d_state
        b_u = tl.load(u + row * d_inner + col[None, :]).to(tl.float32)
        b_dt = tl.load(dt + row * d_inner + col[None, :]).to(tl.float32)
        b_B = tl.load(B + row * bc_row + n[None, :], mask=known, other=0.0).to(tl.float32)
        b_C = tl.load(C + row * bc_row + n[None, :], mask=known, other=0.0).to(tl.float32)
        delta, _ = step_size(b_dt, b_bias[None, :], SOFTPLUS)
        # a step of size zero leaves the state as it is
        delta = tl.where((s < L)[:, None], delta, 0.0)
        decay = tl.exp2(delta[:, :, None] * b_A[None, :, :])
        update = (delta * b_u)[:, :, None] * b_B[:, None, :]
        decay, update = tl.associative_scan((decay, update), 0, _compose)
        states = update + decay * h[None, :, :]
        b_y = tl.sum(states * b_C[:, None, :], 2) + b_D[None, :] * b_u
        h = tl.sum(tl.where((step == TILE - 1)[:, None, None], states, 0.0), 0)
        tl.store(
            y + row * d_inner + col[None, :],
            b_y.to(y.dtype.element_ty),
            mask=inside[None, :] & (s < L)[:, None],
        )


@triton.jit(do_not_specialize=["rows"])
def _gate_kernel(
    y,  # [K, rows, d_inner]
    z,  # [rows, d_inner], rows z_row apart
    out, y_sum,  # [rows, d_inner]
    rows, scale,
    z_row: tl.constexpr, d_inner: tl.constexpr, K: tl.constexpr,
    HAS_Z: tl.constexpr, SAVE_Y: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out = scale * (sum over directions of y) * silu(z)."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    col = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    mask = (row < rows) & (col < d_inner)
    at = row * d_inner + col
    total = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    if K == 2:
        second = y + rows.to(tl.int64) * d_inner
        total += tl.load(second + at, mask=mask, other=0.0).to(tl.float32)
    if SAVE_Y:
        tl.store(y_sum + at, total.to(y_sum.dtype.element_ty), mask=mask)
    total *= scale
    if HAS_Z:
        gate = tl.load(z + row * z_row + col, mask=mask, other=0.0).to(tl.float32)
        total *= gate * tl.sigmoid(gate)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _widen_kernel(
    B0, B1, C0, C1,  # [rows, d_state], rows bc_row apart
    wide,  # [K, 2, rows, d_state] float32
    rows, bc_row: tl.constexpr, d_state: tl.constexpr, BR: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    if which == 0:
        source = B0
    elif which == 1:
        source = C0
    elif which == 2:
        source = B1
    else:
        source = C1
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    n = tl.arange(0, N)[None, :]
    mask = (row < rows) & (n < d_state)
    values = tl.load(source + row * bc_row + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(wide + (which.to(tl.int64) * rows + row) * d_state + n, values, mask=mask)


def scan(
    u: Sequence[Tensor],
    dt: Sequence[Tensor],
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    z: Tensor | None,
    A_log: Sequence[Tensor],
    D: Sequence[Tensor] | None,
    dt_weight: Sequence[Tensor] | None,
    dt_bias: Sequence[Tensor] | None,
    *,
    reverse: Sequence[bool],
    softplus: bool,
    scale: float,
    save_y: bool,
    A_is_log: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`svp_peft.ops.reference.scan`; `y` is None unless `save_y`. Not differentiable."""
    first = u[0]
    rows, d_inner = first.shape[0] * first.shape[1], first.shape[2]
    out = torch.empty_like(first, memory_format=torch.contiguous_format)
    y_sum = torch.empty_like(out) if save_y else None
    if out.numel() == 0:
        return out, y_sum
    with on_device(first):
        y = _directions(u, dt, B, C, A_log, D, dt_weight, dt_bias, reverse, softplus, A_is_log)
        gate, z_row = (out, d_inner) if z is None else with_rows(z)
        _gate_kernel[triton.cdiv(rows, 8), triton.cdiv(d_inner, 128)](
            y, gate, out, out if y_sum is None else y_sum, rows, scale,
            z_row=z_row, d_inner=d_inner, K=len(u),
            HAS_Z=z is not None, SAVE_Y=save_y, BR=8, BD=128, num_warps=4,
        )  # fmt: skip
    return out, y_sum


def _directions(
    u: Sequence[Tensor],
    dt: Sequence[Tensor],
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    A_log: Sequence[Tensor],
    D: Sequence[Tensor] | None,
    dt_weight: Sequence[Tensor] | None,
    dt_bias: Sequence[Tensor] | None,
    reverse: Sequence[bool],
    softplus: bool,
    A_is_log: bool,
) -> Tensor:
    """y of each direction, (K, batch, L, d_inner)."""
    K = len(u)
    u = [x.contiguous() for x in u]
    batch, length, d_inner = u[0].shape
    d_state = A_log[0].shape[1]
    N = power_of_two(max(2, d_state))
    y = u[0].new_empty(K, batch, length, d_inner)
    few = batch * K * triton.cdiv(d_inner, 32) <= _FEW_PROGRAMS
    states, bc_row = with_equal_rows((*B, *C))
    B, C = states[:K], states[K:]
    if not few and u[0].dtype != torch.float32:
        # once for all channels: in the kernel the conversions would be a fifth of all instructions
        wide = u[0].new_empty(K, 2, batch, length, d_state, dtype=torch.float32)
        _widen_kernel[triton.cdiv(batch * length, 64), 2 * K](
            *pair(B, u[0]), *pair(C, u[0]), wide, batch * length,
            bc_row=bc_row, d_state=d_state, BR=64, N=N, num_warps=4,
        )  # fmt: skip
        B, C, bc_row = wide[:, 0].unbind(), wide[:, 1].unbind(), d_state
    pointers = (
        *pair(u, u[0]),
        *pair(step_sizes(dt, dt_weight), u[0]),
        *pair(B, u[0]),
        *pair(C, u[0]),
        *pair(packed(A_log), u[0]),
        *pair(packed(D), u[0]),
        *pair(packed(dt_bias), u[0]),
    )
    settings = {
        "bc_row": bc_row,
        "d_inner": d_inner,
        "d_state": d_state,
        "REVERSE0": bool(reverse[0]),
        "REVERSE1": bool(reverse[-1]),
        "SOFTPLUS": softplus,
        "A_IS_LOG": A_is_log,
        "HAS_D": D is not None,
        "HAS_BIAS": dt_bias is not None,
        "N": N,
    }
    if few:
        BD = max(1, 64 // N)
        _parallel_kernel[batch, triton.cdiv(d_inner, BD), K](
            *pointers, y, length, batch * length, **settings, BD=BD, TILE=_TILE, num_warps=4
        )
    else:
        BD = 32 if N <= 32 else 16
        _sequential_kernel[batch, triton.cdiv(d_inner, BD), K](
            *pointers, y, length, batch * length, **settings, BD=BD, num_warps=1
        )
    return y
