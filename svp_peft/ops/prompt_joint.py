"""The prompts in as few launches as the CUDA kernels allow: products joined, nothing cast twice.

    [cross | middle] = x [W | D]^T + [b | c]          one product
    inner            = middle U^T + d
    out              = x + alpha * SiLU(cross) + beta * SiLU(inner)

Symbols as in `svp_prompt`. The trained weights are in float32 and change at every step, so their
copies in the compute dtype are made once per forward pass, side by side in one buffer, and kept for
the backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svp_peft.ops.backends import kernels


class JointPrompt(torch.autograd.Function):
    """x, the six tensors of the two prompters, alpha and beta, then skip, compute dtype, backend
    and whether to keep the pre-activations for the backward pass -> prompted tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        *tensors, skip, dtype, backend, keep = arguments
        *weights, alpha, beta = tensors
        width = x.shape[-1]
        with torch.autocast(x.device.type, enabled=False):
            x = x.contiguous()
            rows = x.to(dtype).view(-1, width)
            packed = _packed(weights, dtype)
            joint, inner = _pre_activations(rows, packed, width)
            cross = joint[:, :width].unflatten(0, x.shape[:2])
            out = kernels(backend).prompt(x, cross, inner.view(x.shape), alpha, beta, skip)
        ctx.save_for_backward(x, *packed, *tensors, *((joint, inner) if keep else ()))
        ctx.settings = (skip, dtype, backend)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, joint_weight, joint_bias, up_weight, up_bias, *tensors = ctx.saved_tensors
        alpha, beta = tensors[6:8]
        skip, dtype, backend = ctx.settings
        need_x, *need = ctx.needs_input_grad[:9]
        width = x.shape[-1]
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(dtype).view(-1, width)
            packed = (joint_weight, joint_bias, up_weight, up_bias)
            joint, inner = tensors[8:] or _pre_activations(rows, packed, width)
            middle, cross = joint[:, width:], joint[:, :width].unflatten(0, x.shape[:2])
            d_joint = torch.empty_like(joint)
            d_cross, d_middle = d_joint[:, :width], d_joint[:, width:]
            d_inner, sums = kernels(backend).prompt_backward_into(
                grad.to(dtype), cross, inner.view(x.shape), alpha, beta, skip,
                d_cross.unflatten(0, x.shape[:2]),
            )  # fmt: skip
            d_inner = d_inner.view(-1, width)
            torch.mm(d_inner, up_weight, out=d_middle)
            d_x = None
            if need_x and x.dtype == dtype:
                d_x = torch.addmm(grad.reshape(-1, width), d_joint, joint_weight).view(x.shape)
            elif need_x:
                d_x = grad + torch.mm(d_joint, joint_weight).view(x.shape).to(x.dtype)
            d_weight = d_down_bias = d_up = None
            if need[0] or need[2]:
                d_weight = torch.mm(d_joint.t(), rows).to(tensors[0].dtype)
            if need[3]:
                d_down_bias = d_middle.sum(0, dtype=torch.float32)
            if need[4]:
                d_up = torch.mm(d_inner.t(), middle)
        d_alpha, d_beta, d_cross_bias, d_up_bias = sums.unbind(0)
        found = (
            None if d_weight is None else d_weight[:width],
            d_cross_bias,
            None if d_weight is None else d_weight[width:],
            d_down_bias,
            d_up,
            d_up_bias,
            d_alpha,
            d_beta,
        )
        gradients = [
            g.to(t.dtype) if wanted and g is not None else None
            for g, t, wanted in zip(found, tensors[:8], need, strict=True)
        ]
        return (d_x, *gradients, None, None, None, None)


def _packed(weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[W | D] and its bias, U and its bias: copies in `dtype` by one launch."""
    cross, cross_bias, down, down_bias, up, up_bias = weights
    width, bottleneck = cross.shape[0], down.shape[0]
    rows = width + bottleneck
    sizes = (rows * width, rows, width * bottleneck, width)
    joint, joint_bias, up_copy, up_bias_copy = cross.new_empty(sum(sizes), dtype=dtype).split(sizes)
    joint, up_copy = joint.view(rows, width), up_copy.view(width, bottleneck)
    torch._foreach_copy_(
        [
            joint[:width],
            joint_bias[:width],
            joint[width:],
            joint_bias[width:],
            up_copy,
            up_bias_copy,
        ],
        [w.detach() for w in (cross, cross_bias, down, down_bias, up, up_bias)],
    )
    return joint, joint_bias, up_copy, up_bias_copy


def _pre_activations(rows: Tensor, packed: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
    """[cross | middle] (tokens, d_model + bottleneck) and inner (tokens, d_model)."""
    joint_weight, joint_bias, up_weight, up_bias = packed
    joint = torch.addmm(joint_bias, rows, joint_weight.t())
    return joint, torch.addmm(up_bias, joint[:, width:], up_weight.t())
