"""What the scan's Triton kernels share: the discretisation of one step and the loads.

Shapes in these files

    rows     batch * L, the tokens of all images one after the other
    K        directions
    BD, N    channels and states of one program, the states rounded up to a power of two

A reversed direction walks the rows of an image from the last to the first; nothing is flipped. All
arithmetic is in float32. `A` is used as A * log2(e), so that exp(delta A) is one exp2.

Each step is a function, and four of them are written out where a loop over a tuple would do,
because Triton before 3.3 has no tuples.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(raw):
    """log(1 + exp(raw)), the identity above 20, and its derivative."""
    e = tl.exp2(raw * LOG2E)
    # log(1 + e) loses the digits of a small e
    series = e * (1.0 - e * (0.5 - e * (0.33333333 - e * (0.25 - e * 0.2))))
    value = tl.where(e < 0.0625, series, tl.log2(1.0 + e) * LN2)
    return tl.where(raw > 20.0, raw, value), tl.where(raw > 20.0, 1.0, e / (1.0 + e))


@triton.jit
def step_size(dt, bias, SOFTPLUS: tl.constexpr):
    """delta and its derivative with respect to dt."""
    raw = dt + bias
    if SOFTPLUS:
        value, slope = softplus(raw)
    else:
        value = raw
        slope = tl.full(raw.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
def scaled_rates(A_log, col, n, d_state: tl.constexpr, A_IS_LOG: tl.constexpr):
    """A * log2(e) in the shape of `col` and `n` broadcast together; n below d_state."""
    A = tl.load(A_log + col * d_state + n).to(tl.float32)
    if A_IS_LOG:
        A = -tl.exp(A)
    return A * LOG2E


@triton.jit
def channel_vector(pointer, col, PRESENT: tl.constexpr):
    """D or dt_bias of the program's channels; zero where there is none."""
    if PRESENT:
        vector = tl.load(pointer + col).to(tl.float32)
    else:
        vector = tl.zeros(col.shape, tl.float32)
    return vector


@triton.jit
def state_vector(pointer, n, d_state: tl.constexpr, N: tl.constexpr):
    """One token's row of B or C, [N]; zero beyond d_state, so that padded states stay zero."""
    if N == d_state:
        values = tl.load(pointer + n)
    else:
        values = tl.load(pointer + n, mask=n < d_state, other=0.0)
    return values.to(tl.float32)
