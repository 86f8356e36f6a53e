"""The mixer's causal depthwise convolution with SiLU, all directions in one launch.

Shapes in this file

    rows     batch * L, the tokens of all images one after the other
    K        directions; a reversed one sees the tokens after t instead of those before it
    WIDTH    taps
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from svp_peft.ops.triton.launch import on_device, packed, pair, row_stride, with_rows

# tokens and channels of one program; the fastest of those tried on an H100 at Vim-Small's shape
_TOKENS, _CHANNELS = 32, 64


@triton.jit
def _pre_activation(
    x, weight, bias, t, L, col, inside, x_row, REVERSE: tl.constexpr,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The convolution at the tokens t, [BT, BD]; x points to token 0 of the image."""
    total = tl.zeros((BT, BD), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + col).to(tl.float32)[None, :]
    for tap in tl.static_range(WIDTH):
        if REVERSE:
            s = t + (WIDTH - 1 - tap)
        else:
            s = t - (WIDTH - 1 - tap)
        mask = ((s >= 0) & (s < L))[:, None] & inside[None, :]
        b_x = tl.load(x + s[:, None] * x_row + col[None, :], mask=mask, other=0.0).to(tl.float32)
        total += b_x * tl.load(weight + col * WIDTH + tap).to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["L"])
def _forward_kernel(
    x,  # [rows, d_inner], rows x_row apart
    weight0, weight1,  # [d_inner, WIDTH]
    bias0, bias1,  # [d_inner]
    out0, out1,  # [rows, d_inner]
    L,
    x_row: tl.constexpr, d_inner: tl.constexpr, K: tl.constexpr,
    REVERSE0: tl.constexpr, REVERSE1: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # int64: rows * x_row overflows int32 at batch 128 with 10,923 tokens of width 1536
    image = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    channel = tl.program_id(2) * BD + tl.arange(0, BD)
    inside = channel < d_inner
    col = tl.minimum(channel, d_inner - 1)
    x += image * L * x_row
    at = (image * L + t)[:, None] * d_inner + col[None, :]
    mask = (t < L)[:, None] & inside[None, :]
    total = _pre_activation(
        x, weight0, bias0, t, L, col, inside, x_row, REVERSE0, WIDTH, HAS_BIAS, BT, BD
    )
    tl.store(out0 + at, (total * tl.sigmoid(total)).to(out0.dtype.element_ty), mask=mask)
    if K == 2:
        total = _pre_activation(
            x, weight1, bias1, t, L, col, inside, x_row, REVERSE1, WIDTH, HAS_BIAS, BT, BD
        )
        tl.store(out1 + at, (total * tl.sigmoid(total)).to(out1.dtype.element_ty), mask=mask)


@triton.jit
def _direction_backward(
    d_x, grad, x, weight, bias, shares, t, L, first_row, col, inside,
    x_row, d_inner, REVERSE: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr,
    NEED_X: tl.constexpr, NEED_PARAMETERS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add one direction's gradient to d_x, [BT, BD], and store its share of the parameters'.

    Token t was read by the outputs at t + j (t - j where reversed), j = 0..WIDTH-1: their
    activations are computed again.
    """
    for j in tl.static_range(WIDTH if NEED_X else 1):
        if REVERSE:
            s = t - j
        else:
            s = t + j
        pre = _pre_activation(
            x, weight, bias, s, L, col, inside, x_row, REVERSE, WIDTH, HAS_BIAS, BT, BD
        )
        gate = tl.sigmoid(pre)
        mask = ((s >= 0) & (s < L))[:, None] & inside[None, :]
        at = (first_row + s)[:, None] * d_inner + col[None, :]
        b_grad = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        d_pre = b_grad * gate * (1.0 + pre * (1.0 - gate))
        if NEED_X:
            tap = tl.load(weight + col * WIDTH + (WIDTH - 1 - j)).to(tl.float32)
            d_x += d_pre * tap[None, :]
        if NEED_PARAMETERS and j == 0:
            tl.store(shares + WIDTH * d_inner, tl.sum(d_pre, 0), mask=inside)
            for tap in tl.static_range(WIDTH):
                if REVERSE:
                    r = t + (WIDTH - 1 - tap)
                else:
                    r = t - (WIDTH - 1 - tap)
                seen = ((r >= 0) & (r < L))[:, None] & inside[None, :]
                b_x = tl.load(x + r[:, None] * x_row + col[None, :], mask=seen, other=0.0)
                d_tap = tl.sum(d_pre * b_x.to(tl.float32), 0)
                tl.store(shares + tap * d_inner, d_tap, mask=inside)
    return d_x


@triton.jit(do_not_specialize=["L"])
def _backward_kernel(
    grad0, grad1,  # [rows, d_inner]
    x,  # [rows, d_inner], rows x_row apart
    weight0, weight1,  # [d_inner, WIDTH]
    bias0, bias1,  # [d_inner]
    dx,  # [rows, d_inner], rows dx_row apart
    shares,  # [images, tiles, K, WIDTH + 1, d_inner] float32: of the taps, then of the bias
    L,
    x_row: tl.constexpr, dx_row: tl.constexpr, d_inner: tl.constexpr, K: tl.constexpr,
    REVERSE0: tl.constexpr, REVERSE1: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr,
    NEED_X: tl.constexpr, NEED_PARAMETERS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    t = tile * BT + tl.arange(0, BT)
    channel = tl.program_id(2) * BD + tl.arange(0, BD)
    inside = channel < d_inner
    col = tl.minimum(channel, d_inner - 1)
    first_row = image * L
    x += first_row * x_row
    shares += (image * tl.num_programs(1) + tile) * (K * (WIDTH + 1) * d_inner) + channel
    d_x = tl.zeros((BT, BD), tl.float32)
    d_x = _direction_backward(
        d_x, grad0, x, weight0, bias0, shares, t, L, first_row, col, inside, x_row, d_inner,
        REVERSE0, WIDTH, HAS_BIAS, NEED_X, NEED_PARAMETERS, BT, BD,
    )  # fmt: skip
    if K == 2:
        d_x = _direction_backward(
            d_x, grad1, x, weight1, bias1, shares + (WIDTH + 1) * d_inner, t, L, first_row, col,
            inside, x_row, d_inner,
            REVERSE1, WIDTH, HAS_BIAS, NEED_X, NEED_PARAMETERS, BT, BD,
        )  # fmt: skip
    if NEED_X:
        at = (first_row + t)[:, None] * dx_row + col[None, :]
        mask = (t < L)[:, None] & inside[None, :]
        tl.store(dx + at, d_x.to(dx.dtype.element_ty), mask=mask)


def conv_silu(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    reverse: Sequence[bool],
) -> tuple[Tensor, ...]:
    """`svp_peft.ops.reference.conv_silu`. Not differentiable."""
    x, x_row = with_rows(x)
    batch, length, d_inner = x.shape
    out = tuple(x.new_empty(x.shape) for _ in weight)
    if x.numel() == 0:
        return out
    grid = (batch, triton.cdiv(length, _TOKENS), triton.cdiv(d_inner, _CHANNELS))
    with on_device(x):
        _forward_kernel[grid](
            x, *pair(packed(weight), x), *pair(packed(bias), x), *pair(out, x), length,
            **_settings(x_row, weight, bias, reverse), num_warps=4,
        )  # fmt: skip
    return out


def conv_silu_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    reverse: Sequence[bool],
    *,
    dx_out: Tensor | None = None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
    """Gradients of `conv_silu`: (dx, per direction dweight, per direction dbias).

    Args:
        grads: per direction, (batch, L, d_inner).
        dx_out: (batch, L, d_inner), any row stride: where dx is written.
        need_x, need_weight, need_bias: which gradients are wanted; the others are None.

    Returns:
        dx in x's dtype; dweight (d_inner, width) and dbias (d_inner,) in float32. The same inputs
        give the same bits.
    """
    x, x_row = with_rows(x)
    batch, length, d_inner = x.shape
    width, K = weight[0].shape[-1], len(weight)
    need_bias = need_bias and bias is not None
    tiles = triton.cdiv(length, _TOKENS)
    dx = None
    if need_x:
        direct = dx_out is not None and row_stride(dx_out) is not None
        dx = dx_out if direct else x.new_empty(x.shape)
    target, dx_row = (x, x_row) if dx is None else with_rows(dx)
    need_parameters = need_weight or need_bias
    shares = x.new_empty(
        (batch, tiles, K, width + 1, d_inner) if need_parameters else (1,), dtype=torch.float32
    )
    if x.numel() and (need_x or need_parameters):
        with on_device(x):
            _backward_kernel[batch, tiles, triton.cdiv(d_inner, _CHANNELS)](
                *pair([g.contiguous() for g in grads], x), x, *pair(packed(weight), x),
                *pair(packed(bias), x), target, shares, length,
                **_settings(x_row, weight, bias, reverse), dx_row=dx_row,
                NEED_X=need_x, NEED_PARAMETERS=need_parameters, num_warps=4,
            )  # fmt: skip
    if dx is not None and dx_out is not None and dx is not dx_out:
        dx = dx_out.copy_(dx)
    d_weight = d_bias = None
    if need_parameters:
        total = shares.flatten(0, 1).sum(0)
        if need_weight:
            d_weight = tuple(total[k, :width].T.reshape(w.shape) for k, w in enumerate(weight))
        if need_bias:
            d_bias = tuple(total[:, width].unbind())
    return dx, d_weight, d_bias


def _settings(
    x_row: int,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    reverse: Sequence[bool],
) -> dict[str, int | bool]:
    return {
        "x_row": x_row,
        "d_inner": weight[0].shape[0],
        "K": len(weight),
        "REVERSE0": bool(reverse[0]),
        "REVERSE1": bool(reverse[-1]),
        "WIDTH": weight[0].shape[-1],
        "HAS_BIAS": bias is not None,
        "BT": _TOKENS,
        "BD": _CHANNELS,
    }
