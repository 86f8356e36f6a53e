"""The whole Vim mixer in plain PyTorch: projections, convolution, both scans, gate."""

import torch
from torch import Tensor

from svp_peft.ops.reference.conv import conv_silu
from svp_peft.ops.reference.scan import scan
from svp_peft.ops.types import MixerWeights


def mixer(hidden: Tensor, weights: MixerWeights, *, scale: float) -> Tensor:
    """The mixer of one block, differentiable in the input and in every weight.

        x, z       = split(hidden W_in^T + b_in)
        u_k        = SiLU(conv_k(x))                       k = direction
        dt, B, C   = split(u_k W_x,k^T)
        out        = [scale * (sum_k scan_k(u_k, dt, B, C)) * SiLU(z)] W_out^T + b_out

    Args:
        hidden: float (batch, L, d_model).
        weights: see `MixerWeights`. One convolution with two scans is bimamba "v1": both
            directions then share everything but A.
        scale: 0.5 where the sum of two directions is divided by two.

    Returns:
        (batch, L, d_model) in hidden's dtype.
    """
    compute = hidden.dtype

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product = x @ weight.to(compute).T
        return product if bias is None else product + bias.to(compute)

    xz = linear(hidden, weights.in_proj_weight, weights.in_proj_bias)
    x, z = xz.chunk(2, dim=-1)
    u = conv_silu(x, weights.conv_weight, weights.conv_bias, weights.conv_reverse)
    dt_rank = weights.dt_weight[0].shape[1]
    d_state = weights.A_log[0].shape[1]
    sizes = [dt_rank, d_state, d_state]
    low = [
        torch.split(linear(u_k, w_k, None), sizes, dim=-1)
        for u_k, w_k in zip(u, weights.x_proj_weight, strict=True)
    ]
    pick = weights.source_of_direction
    gated, _ = scan(
        [u[k] for k in pick],
        [low[k][0] for k in pick],
        [low[k][1] for k in pick],
        [low[k][2] for k in pick],
        z,
        weights.A_log,
        [weights.D[k] for k in pick],
        [weights.dt_weight[k] for k in pick],
        [weights.dt_bias[k] for k in pick],
        reverse=weights.scan_reverse,
        scale=scale,
    )
    return linear(gated, weights.out_proj_weight, weights.out_proj_bias)
