"""Residual add and normalisation in C++: csrc/tokens.cpp; float32."""

import torch
from torch import Tensor

from svp_peft.ops.cpu.call import Call


def add_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    rms: bool,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`svp_peft.ops.reference.add_norm`, for any axes before d_model; no derivative."""
    y, total = hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)
    call = Call()
    call.numbers(*_tokens(hidden).shape, rms)
    call.rows(_tokens(hidden))
    call.rows(None if residual is None else _tokens(residual.to(torch.float32)))
    call.parameters(weight, bias)
    for tensor in (y, total):
        call.rows(_tokens(tensor))
    if hidden.numel() > 0:
        call.run("svp_norm_forward", eps)
    return y, total.to(residual_dtype)


def add_norm_backward(
    grad_y: Tensor,
    grad_residual_out: Tensor | None,
    residual_out: Tensor,
    weight: Tensor,
    *,
    eps: float,
    rms: bool,
    need_weight: bool,
    need_bias: bool,
    hidden_dtype: torch.dtype,
    residual_in_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of hidden, residual, weight and bias; None where not asked for.

    The first two are one tensor where their dtypes agree: the sum passes its gradient on to both.

    Args:
        grad_residual_out: gradient of the sum itself, or None.
        residual_out: the sum that `add_norm` returned.
        residual_in_dtype: dtype of the residual that went in; None where it wants no gradient.
    """
    total = residual_out.to(torch.float32)
    d_total = torch.empty_like(total, memory_format=torch.contiguous_format)
    # sums over the tokens, of which there may be none
    d_weight = total.new_zeros(weight.shape) if need_weight else None
    d_bias = total.new_zeros(weight.shape) if need_bias else None
    call = Call()
    call.numbers(*_tokens(total).shape, rms)
    for tensor in (grad_y, grad_residual_out):
        call.rows(None if tensor is None else _tokens(tensor.to(torch.float32)))
    call.rows(_tokens(total))
    call.parameters(weight)
    call.rows(_tokens(d_total))
    call.parameters(d_weight, d_bias)
    if total.numel() > 0:
        call.run("svp_norm_backward", eps)
    d_residual = None if residual_in_dtype is None else d_total.to(residual_in_dtype)
    return d_total.to(hidden_dtype), d_residual, d_weight, d_bias


def _tokens(x: Tensor) -> Tensor:
    """(..., d_model) as the kernels' (batch, L, d_model)."""
    return x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
