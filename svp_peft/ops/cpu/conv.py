"""The depthwise convolution with its SiLU in C++: csrc/conv.cpp; float32."""

from collections.abc import Sequence

import torch
from torch import Tensor

from svp_peft.ops.cpu.call import Call, at


def conv_silu(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor] | None, reverse: Sequence[bool]
) -> tuple[Tensor, ...]:
    """`svp_peft.ops.reference.conv_silu`, without a derivative."""
    out = tuple(x.new_empty(x.shape) for _ in reverse)
    if x.numel() == 0:
        return out
    call = _inputs(x, weight, bias, reverse)
    call.rows(x)
    for k in (0, len(out) - 1):
        call.rows(out[k])
    call.run("svp_conv_forward")
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
    """The gradients of x, of each direction's weight and bias: those asked for, else None.

    Args:
        grads: per direction, (batch, L, d_inner), of what `conv_silu` returned.
        dx_out: (batch, L, d_inner) view that dx is written into.
    """
    dx = (x.new_empty(x.shape) if dx_out is None else dx_out) if need_x else None
    d_weight = d_bias = None
    # sums over the tokens, of which there may be none
    if need_weight:
        d_weight = tuple(x.new_zeros(w.shape, dtype=torch.float32) for w in weight)
    if need_bias and bias is not None:
        d_bias = tuple(x.new_zeros(b.shape, dtype=torch.float32) for b in bias)
    call = _inputs(x, weight, bias, reverse)
    call.rows(x)
    last = len(grads) - 1
    for k in (0, last):
        call.rows(grads[k])
    call.rows(dx)
    call.parameters(at(d_weight, 0), at(d_weight, last), at(d_bias, 0), at(d_bias, last))
    if x.numel() > 0:
        call.run("svp_conv_backward")
    return dx, d_weight, d_bias


def _inputs(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor] | None, reverse: Sequence[bool]
) -> Call:
    """The fields of ConvShape and of both ConvDirections; a missing second repeats the first."""
    call = Call()
    batch, length, d_inner = x.shape
    call.numbers(batch, length, d_inner, weight[0].numel() // d_inner, len(reverse))
    for k in (0, len(reverse) - 1):
        call.parameters(weight[k], at(bias, k))
        call.numbers(reverse[k])
    return call
