"""Selective scan backward: two sweeps over the sequence, no stored states.

With h_t = a_t h_{t-1} + delta_t u_t B_t, where a_t = exp(delta_t A), and v_t = a_{t+1} g_{t+1} for
the adjoint g_t = v_t + gy_t C_t, the gradient of delta needs A a_t g_t h_{t-1}, a product of one
value from each sweep. It telescopes, per channel and state:

    a_t g_t h_{t-1} = sum over s >= t of (gy_s C_s (a_s h_{s-1}) - delta_s u_s B_s v_s)

so the sweeps never have to meet. The first leaves G_s = gy_s sum_n A C_s a_s h_{s-1}, one number
per channel and step; the second subtracts R_s = delta_s u_s sum_n A B_s v_s and keeps the running
sum U. (With h_s and g_s in place of a_s h_{s-1} and v_s the same identity holds, but then
gy_s delta_s u_s A B_s C_s enters both terms and its cancellation costs digits where delta A is
large.)

dA = sum over t of delta_t a_t g_t h_{t-1}, per state, does not survive telescoping: the weights
delta_t differ by orders of magnitude. Where dA is wanted, and only there, the first sweep leaves
the state before every fourth step, the second computes a_t h_{t-1} again from it, and U is the
direct product.

Sums over channels and images go through partial sums, one per program, added in a fixed order: two
runs give the same bits.
"""

import triton
import triton.language as tl

from svp_peft.ops.triton.scan_kernels import (
    LN2,
    channel_vector,
    scaled_rates,
    state_vector,
    step_size,
)


@triton.jit(do_not_specialize=["rows"])
def gate_backward_kernel(
    grad, y,  # [rows, d_inner]
    z, dz,  # [rows, d_inner], rows z_row and dz_row apart
    dy,  # [rows, d_inner] float32
    rows, scale,
    z_row: tl.constexpr, dz_row: tl.constexpr, d_inner: tl.constexpr,
    NEED_Y: tl.constexpr, NEED_Z: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of scale * y * silu(z)."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    col = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    mask = (row < rows) & (col < d_inner)
    b_grad = scale * tl.load(grad + row * d_inner + col, mask=mask, other=0.0).to(tl.float32)
    b_z = tl.load(z + row * z_row + col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.sigmoid(b_z)
    if NEED_Y:
        tl.store(dy + row * d_inner + col, b_grad * b_z * gate, mask=mask)
    if NEED_Z:
        b_y = tl.load(y + row * d_inner + col, mask=mask, other=0.0).to(tl.float32)
        b_dz = b_grad * b_y * gate * (1.0 + b_z * (1.0 - gate))
        tl.store(dz + row * dz_row + col, b_dz.to(dz.dtype.element_ty), mask=mask)


@triton.jit
def _inputs(
    u, dt, B, C, dy, bias, row, col, n, here,
    bc_row, d_inner, d_state: tl.constexpr, N: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """One token: delta, its derivative, u and dy [BD]; B and C [N].

    `here` is false beyond the end of the sequence and of the channels: delta = dy = 0 there leaves
    everything that the sweeps carry as it is.
    """
    at = row * d_inner + col
    delta, slope = step_size(tl.load(dt + at).to(tl.float32), bias, SOFTPLUS)
    b_u = tl.load(u + at).to(tl.float32)
    b_dy = tl.load(dy + at).to(tl.float32)
    b_B = state_vector(B + row * bc_row, n, d_state, N)
    b_C = state_vector(C + row * bc_row, n, d_state, N)
    return tl.where(here, delta, 0.0), slope, b_u, tl.where(here, b_dy, 0.0), b_B, b_C


@triton.jit
def _decay_and_feed(h, delta, u, B, A):
    """a_t h_{t-1} and h_t, [BD, N]."""
    decayed = tl.exp2(delta[:, None] * A) * h
    return decayed, decayed + (delta * u)[:, None] * B[None, :]


@triton.jit
def _first_step(
    h, delta, u, dy, B, C, A, G, dC, here, known, NEED_G: tl.constexpr, NEED_C: tl.constexpr
):
    """h_t from h_{t-1}; stores G_t and this program's share of dC_t."""
    decayed, h = _decay_and_feed(h, delta, u, B, A)
    if NEED_G:
        tl.store(G, dy * tl.sum(decayed * C[None, :] * A, 1), mask=here)
    if NEED_C:
        tl.store(dC, tl.sum(h * dy[:, None], 0), mask=known)
    return h


@triton.jit
def _second_step(
    v, U, d_A, d_D, d_bias, decayed, delta, slope, u, dy, B, C, G, A, D, du, ddt, dB, here, known,
    NEED_U: tl.constexpr, NEED_DT: tl.constexpr, STORE_DT: tl.constexpr,
    NEED_B: tl.constexpr, NEED_A: tl.constexpr,
):  # fmt: skip
    """v_{t-1} from v_t, [BD, N]; stores du_t, ddt_t and this program's share of dB_t."""
    fed = delta * u
    g = v + dy[:, None] * C[None, :]
    d_fed = tl.sum(g * B[None, :], 1)
    if NEED_A:
        both = g * decayed
        d_A += delta[:, None] * both
        U = tl.sum(both * A, 1)
    elif NEED_DT:
        U += G - fed * tl.sum(v * B[None, :] * A, 1)
    if NEED_DT:
        d_raw = tl.where(here, (LN2 * U + u * d_fed) * slope, 0.0)
        d_bias += d_raw
        if STORE_DT:
            tl.store(ddt, d_raw.to(ddt.dtype.element_ty), mask=here)
    if NEED_U:
        tl.store(du, (D * dy + delta * d_fed).to(du.dtype.element_ty), mask=here)
    if NEED_B:
        tl.store(dB, tl.sum(g * fed[:, None], 0), mask=known)
    d_D += dy * u
    return g * tl.exp2(delta[:, None] * A), U, d_A, d_D, d_bias


@triton.jit
def _load_if(pointer, mask, PRESENT: tl.constexpr):
    if PRESENT:
        values = tl.load(pointer, mask=mask, other=0.0)
    else:
        values = 0.0
    return values


@triton.jit(do_not_specialize=["L", "rows"])
def backward_kernel(
    u0, u1, dt0, dt1,  # [rows, d_inner]
    B0, B1, C0, C1,  # [rows, d_state], rows bc_row apart
    A0, A1,  # [d_inner, d_state]
    D0, D1, bias0, bias1,  # [d_inner]
    dy,  # [rows, d_inner]
    G,  # [K, rows, d_inner] float32
    du0, du1, ddt0, ddt1,  # [rows, d_inner]
    dB, dC,  # [parts, K, rows, d_state] float32
    starts,  # [K, images, groups, d_inner, d_state] float32: the state before every fourth step
    dA,  # [K, images, d_inner, d_state] float32
    dD, dbias,  # [K, images, d_inner] float32
    L, rows,
    bc_row: tl.constexpr, d_inner: tl.constexpr, d_state: tl.constexpr, K: tl.constexpr,
    REVERSE0: tl.constexpr, REVERSE1: tl.constexpr, SOFTPLUS: tl.constexpr, A_IS_LOG: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    NEED_U: tl.constexpr, NEED_DT: tl.constexpr, STORE_DT: tl.constexpr, NEED_G: tl.constexpr,
    NEED_B: tl.constexpr, NEED_C: tl.constexpr, NEED_A: tl.constexpr, NEED_D: tl.constexpr,
    NEED_BIAS: tl.constexpr, BD: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    direction = tl.program_id(2)
    if direction == 0:
        u, dt, B, C, du, ddt = u0, dt0, B0, C0, du0, ddt0
        A_log, D, bias, reverse = A0, D0, bias0, REVERSE0
    else:
        u, dt, B, C, du, ddt = u1, dt1, B1, C1, du1, ddt1
        A_log, D, bias, reverse = A1, D1, bias1, REVERSE1
    channel = part * BD + tl.arange(0, BD)
    inside = channel < d_inner
    col = tl.minimum(channel, d_inner - 1)
    n = tl.arange(0, N)
    known = n < d_state
    whole = inside[:, None] & known[None, :]
    first = image * L + tl.where(reverse, L - 1, 0)
    sign = tl.where(reverse, -1, 1)
    G += direction.to(tl.int64) * rows * d_inner + col
    share = (part.to(tl.int64) * K + direction) * rows * d_state + n
    dB += share
    dC += share
    image += direction * (rows // L)
    groups = tl.cdiv(L, 4)
    starts += (image * groups * d_inner + col[:, None]) * d_state + n[None, :]
    if N == d_state:
        b_A = scaled_rates(A_log, col[:, None], n[None, :], d_state, A_IS_LOG)
    else:
        b_A = scaled_rates(
            A_log, col[:, None], tl.minimum(n, d_state - 1)[None, :], d_state, A_IS_LOG
        )
    b_D = channel_vector(D, col, HAS_D)
    b_bias = channel_vector(bias, col, HAS_BIAS)
    # Triton before 3.3 knows no chain of three
    if NEED_G or (NEED_C or NEED_A):
        h = tl.zeros((BD, N), tl.float32)
        for s in range(0, L, 4):
            if NEED_A:
                tl.store(starts, h, mask=whole)
                starts += d_inner * d_state
            # four steps are read before the first is used, so that their latencies overlap
            r0 = first + sign * s
            r1 = first + sign * tl.minimum(s + 1, L - 1)
            in1 = inside & (s + 1 < L)
            r2 = first + sign * tl.minimum(s + 2, L - 1)
            in2 = inside & (s + 2 < L)
            r3 = first + sign * tl.minimum(s + 3, L - 1)
            in3 = inside & (s + 3 < L)
            delta0, _, x0, dy0, p0, q0 = _inputs(
                u, dt, B, C, dy, b_bias, r0, col, n, inside, bc_row, d_inner, d_state, N, SOFTPLUS
            )
            delta1, _, x1, dy1, p1, q1 = _inputs(
                u, dt, B, C, dy, b_bias, r1, col, n, in1, bc_row, d_inner, d_state, N, SOFTPLUS
            )
            delta2, _, x2, dy2, p2, q2 = _inputs(
                u, dt, B, C, dy, b_bias, r2, col, n, in2, bc_row, d_inner, d_state, N, SOFTPLUS
            )
            delta3, _, x3, dy3, p3, q3 = _inputs(
                u, dt, B, C, dy, b_bias, r3, col, n, in3, bc_row, d_inner, d_state, N, SOFTPLUS
            )
            h = _first_step(
                h, delta0, x0, dy0, p0, q0, b_A,
                G + r0 * d_inner, dC + r0 * d_state, inside, known, NEED_G, NEED_C,
            )  # fmt: skip
            h = _first_step(
                h, delta1, x1, dy1, p1, q1, b_A,
                G + r1 * d_inner, dC + r1 * d_state, in1, known & (s + 1 < L), NEED_G, NEED_C,
            )  # fmt: skip
            h = _first_step(
                h, delta2, x2, dy2, p2, q2, b_A,
                G + r2 * d_inner, dC + r2 * d_state, in2, known & (s + 2 < L), NEED_G, NEED_C,
            )  # fmt: skip
            h = _first_step(
                h, delta3, x3, dy3, p3, q3, b_A,
                G + r3 * d_inner, dC + r3 * d_state, in3, known & (s + 3 < L), NEED_G, NEED_C,
            )  # fmt: skip
        # the second sweep reads what other lanes may have written
        tl.debug_barrier()

    v = tl.zeros((BD, N), tl.float32)
    d_A = tl.zeros((BD, N), tl.float32)
    U = tl.zeros((BD,), tl.float32)
    d_D = tl.zeros((BD,), tl.float32)
    d_bias = tl.zeros((BD,), tl.float32)
    for done in range(0, groups):
        s = (groups - 1 - done) * 4
        r0 = first + sign * s
        r1 = first + sign * tl.minimum(s + 1, L - 1)
        in1 = inside & (s + 1 < L)
        r2 = first + sign * tl.minimum(s + 2, L - 1)
        in2 = inside & (s + 2 < L)
        r3 = first + sign * tl.minimum(s + 3, L - 1)
        in3 = inside & (s + 3 < L)
        delta0, slope0, x0, dy0, p0, q0 = _inputs(
            u, dt, B, C, dy, b_bias, r0, col, n, inside, bc_row, d_inner, d_state, N, SOFTPLUS
        )
        delta1, slope1, x1, dy1, p1, q1 = _inputs(
            u, dt, B, C, dy, b_bias, r1, col, n, in1, bc_row, d_inner, d_state, N, SOFTPLUS
        )
        delta2, slope2, x2, dy2, p2, q2 = _inputs(
            u, dt, B, C, dy, b_bias, r2, col, n, in2, bc_row, d_inner, d_state, N, SOFTPLUS
        )
        delta3, slope3, x3, dy3, p3, q3 = _inputs(
            u, dt, B, C, dy, b_bias, r3, col, n, in3, bc_row, d_inner, d_state, N, SOFTPLUS
        )
        G0 = _load_if(G + r0 * d_inner, inside, NEED_G)
        G1 = _load_if(G + r1 * d_inner, in1, NEED_G)
        G2 = _load_if(G + r2 * d_inner, in2, NEED_G)
        G3 = _load_if(G + r3 * d_inner, in3, NEED_G)
        c0, c1, c2, c3 = v, v, v, v
        if NEED_A:
            starts -= d_inner * d_state
            h = tl.load(starts, mask=whole, other=0.0)
            c0, h = _decay_and_feed(h, delta0, x0, p0, b_A)
            c1, h = _decay_and_feed(h, delta1, x1, p1, b_A)
            c2, h = _decay_and_feed(h, delta2, x2, p2, b_A)
            c3, h = _decay_and_feed(h, delta3, x3, p3, b_A)
        v, U, d_A, d_D, d_bias = _second_step(
            v, U, d_A, d_D, d_bias, c3, delta3, slope3, x3, dy3, p3, q3, G3, b_A, b_D,
            du + r3 * d_inner + col, ddt + r3 * d_inner + col, dB + r3 * d_state,
            in3, known & (s + 3 < L), NEED_U, NEED_DT, STORE_DT, NEED_B, NEED_A,
        )  # fmt: skip
        v, U, d_A, d_D, d_bias = _second_step(
            v, U, d_A, d_D, d_bias, c2, delta2, slope2, x2, dy2, p2, q2, G2, b_A, b_D,
            du + r2 * d_inner + col, ddt + r2 * d_inner + col, dB + r2 * d_state,
            in2, known & (s + 2 < L), NEED_U, NEED_DT, STORE_DT, NEED_B, NEED_A,
        )  # fmt: skip
        v, U, d_A, d_D, d_bias = _second_step(
            v, U, d_A, d_D, d_bias, c1, delta1, slope1, x1, dy1, p1, q1, G1, b_A, b_D,
            du + r1 * d_inner + col, ddt + r1 * d_inner + col, dB + r1 * d_state,
            in1, known & (s + 1 < L), NEED_U, NEED_DT, STORE_DT, NEED_B, NEED_A,
        )  # fmt: skip
        v, U, d_A, d_D, d_bias = _second_step(
            v, U, d_A, d_D, d_bias, c0, delta0, slope0, x0, dy0, p0, q0, G0, b_A, b_D,
            du + r0 * d_inner + col, ddt + r0 * d_inner + col, dB + r0 * d_state,
            inside, known, NEED_U, NEED_DT, STORE_DT, NEED_B, NEED_A,
        )  # fmt: skip
    vector = image * d_inner + col
    if NEED_D:
        tl.store(dD + vector, d_D, mask=inside)
    if NEED_BIAS:
        tl.store(dbias + vector, d_bias, mask=inside)
    if NEED_A:
        if A_IS_LOG:
            d_A *= b_A * LN2
        at = vector[:, None] * d_state + n[None, :]
        tl.store(dA + at, d_A, mask=whole)


@triton.jit(do_not_specialize=["rows"])
def sum_parts_kernel(
    shares,  # [parts, K, rows, d_state] float32
    sum0, sum1,  # [rows, d_state], rows sum_row apart
    rows,
    sum_row: tl.constexpr, d_state: tl.constexpr, K: tl.constexpr, parts: tl.constexpr,
    BR: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    direction = tl.program_id(1)
    if direction == 0:
        target = sum0
    else:
        target = sum1
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    n = tl.arange(0, N)[None, :]
    mask = (row < rows) & (n < d_state)
    total = tl.zeros((BR, N), tl.float32)
    at = (direction.to(tl.int64) * rows + row) * d_state + n
    for _ in range(parts):
        total += tl.load(shares + at, mask=mask, other=0.0)
        at += K * rows.to(tl.int64) * d_state
    tl.store(target + row * sum_row + n, total.to(target.dtype.element_ty), mask=mask)
