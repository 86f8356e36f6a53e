"""Residual add and normalisation in plain PyTorch."""

import torch
from torch import Tensor


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
    """Add the block's input to the residual stream and normalise the sum.

        r = hidden + residual
        y = r / sqrt(mean(r^2) + eps) * weight + bias                      rms
        y = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias             otherwise (LayerNorm)

    Args:
        hidden: float (batch, L, d_model), what the previous mixer returned.
        residual: (batch, L, d_model), or None in the first block.
        weight, bias: (d_model,); bias may be None.
        residual_dtype: dtype of the returned residual.

    Returns:
        `y` in hidden's dtype and `r` in `residual_dtype`; all arithmetic is in float32, or float64
        where an input is.
    """
    compute = torch.promote_types(hidden.dtype, torch.float32)
    if residual is not None:
        compute = torch.promote_types(compute, residual.dtype)
    total = hidden.to(compute)
    if residual is not None:
        total = total + residual.to(compute)
    centred = total if rms else total - total.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(hidden.dtype), total.to(residual_dtype)
