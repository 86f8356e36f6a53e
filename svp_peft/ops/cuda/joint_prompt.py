"""The prompts in as few launches and as little work on the host as will do.

    [cross | middle] = x [W | D]^T + [b | c]          one product
    inner            = middle U^T + d
    out              = x + alpha * SiLU(cross) + beta * SiLU(inner)

Symbols as in `svp_peft.ops.svp_prompt`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svp_peft.ops.casting import without_autocast
from svp_peft.ops.cuda.kernels import multiprocessors
from svp_peft.ops.cuda.layout import device_index
from svp_peft.ops.cuda.prompt import _kernel_for, _rows_of_block
from svp_peft.ops.cuda.prompter_copies import Copies, Packed
from svp_peft.ops.cuda.wide import wide_product
from svp_peft.ops.derivatives import refuse_second
from svp_peft.ops.types import Cache


def joint_prompt(
    x: Tensor,
    tensors: Sequence[Tensor],
    skip: tuple[int, ...],
    dtype: torch.dtype,
    keep: bool,
    cache: Cache | None,
) -> Tensor:
    """Prompted tokens, (batch, L, d_model) in x's dtype.

    Args:
        x: (batch, L, d_model), not empty.
        tensors: the six weights of the two prompters in the order of `svp_prompt`, alpha and beta.
        skip: positions of the class tokens.
        dtype: of the products.
        keep: whether the pre-activations are kept for the backward pass.
        cache: kept by the caller for these weights, or None.
    """
    packed = _packed(tensors[:6], dtype, cache)
    return _JointPrompt.apply(x, *tensors, packed, skip, dtype, keep)  # type: ignore[no-any-return]


def _packed(weights: Sequence[Tensor], dtype: torch.dtype, cache: Cache | None) -> Packed:
    copies: Copies | None = None if cache is None else cache.prepared
    if copies is None or not copies.is_for((weights,), dtype):
        # a buffer made in inference mode could not be used for training
        with torch.inference_mode(False), torch.no_grad():
            copies = Copies([[w.detach() for w in weights]], dtype)
        # what is allocated under capture belongs to the graph's pool
        if cache is not None and not torch.cuda.is_current_stream_capturing():
            cache.prepared = copies
    return copies.renewed()[0]


def _pre_activations(rows: Tensor, packed: Packed, width: int) -> tuple[Tensor, Tensor]:
    """[cross | middle] (tokens, d_model + bottleneck) and inner (tokens, d_model)."""
    joint = torch.addmm(packed.joint_bias, rows, packed.joint.t())
    return joint, torch.addmm(packed.up_bias, joint[:, width:], packed.up.t())


class _JointPrompt(torch.autograd.Function):
    """x, the eight tensors, then copies, skip, compute dtype and keep -> prompted tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        *tensors, packed, skip, dtype, keep = arguments
        alpha, beta = tensors[6:]
        batch, length, width = x.shape
        x = x.contiguous()
        rows = (x if x.dtype == dtype else x.to(dtype)).view(-1, width)
        joint, inner = _pre_activations(rows, packed, width)
        out = torch.empty_like(x)
        # the kernel reads halves as halves and x as what it is: one dtype for all
        if x.dtype != dtype:
            joint_at, inner_at = joint.to(x.dtype), inner.to(x.dtype)
        else:
            joint_at, inner_at = joint, inner
        row = joint.shape[1]
        kernel, pack = _kernel_for("prompt_forward", x, joint_at, row, inner_at, width, skip)
        tokens = batch * length
        kernel(
            (-(-tokens * (width // pack) // 256), 1, 1),
            x.data_ptr(), joint_at.data_ptr(), inner_at.data_ptr(),
            alpha.data_ptr(), beta.data_ptr(), out.data_ptr(), 0, 0, 0,
            tokens, length, row, width, 0,
        )  # fmt: skip
        ctx.save_for_backward(x, *packed, *tensors, *((joint, inner) if keep else ()))
        ctx.skip, ctx.dtype = skip, dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second()
        with without_autocast(grad.device):
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Those of the arguments of `_JointPrompt.forward`."""
    x, *saved = ctx.saved_tensors
    packed, tensors = Packed(*saved[: len(Packed._fields)]), saved[len(Packed._fields) :]
    alpha, beta = tensors[6:8]
    dtype, skip = ctx.dtype, ctx.skip
    need_x, *need = ctx.needs_input_grad[:9]
    batch, length, width = x.shape
    tokens = batch * length
    rows = (x if x.dtype == dtype else x.to(dtype)).view(-1, width)
    if len(tensors) > 8:
        joint, inner = tensors[8:]
    else:
        joint, inner = _pre_activations(rows, packed, width)
    row = joint.shape[1]
    flat = (grad if grad.dtype == dtype else grad.to(dtype)).reshape(-1, width)
    d_joint, d_inner = torch.empty_like(joint), torch.empty_like(inner)
    kernel, pack = _kernel_for(
        "prompt_backward", flat.view(x.shape), joint, row, inner, width, skip, row, d_joint
    )
    # few partial sums: adding them up is a launch of its own, as long as a short kernel
    wanted = -(-tokens // (4 * _rows_of_block(width // pack)))
    blocks = min(wanted, 3 * multiprocessors(device_index(x)))
    partial = torch.empty((blocks, 4, width), device=x.device, dtype=torch.float32)
    kernel(
        (blocks, 1, 1),
        flat.data_ptr(), joint.data_ptr(), inner.data_ptr(), alpha.data_ptr(), beta.data_ptr(),
        0, d_joint.data_ptr(), d_inner.data_ptr(), partial.data_ptr(),
        tokens, length, row, width, row,
    )  # fmt: skip
    sums = partial.sum(0)
    torch.mm(d_inner, packed.up, out=d_joint[:, width:])
    d_x = None
    if need_x and x.dtype == dtype:
        d_x = torch.addmm(flat, d_joint, packed.joint).view(x.shape)
    elif need_x:
        d_x = grad + torch.mm(d_joint, packed.joint).view(x.shape).to(x.dtype)
    d_cross = d_down = d_down_bias = d_up = None
    if need[0] or need[2]:
        d_cross, d_down = wide_product(d_joint.t(), rows, tensors[0].dtype).split(
            (width, row - width)
        )
    if need[3]:  # the sum of d_middle = d_inner U over the tokens, with that of d_inner
        d_down_bias = torch.mv(tensors[4].t(), sums[3].to(tensors[4].dtype))
    if need[4]:
        d_up = wide_product(d_inner.t(), joint[:, width:], tensors[4].dtype)
    d_alpha, d_beta, d_cross_bias, d_up_bias = sums.unbind(0)
    found = (
        d_cross, d_cross_bias, d_down, d_down_bias, d_up, d_up_bias, d_alpha, d_beta,
    )  # fmt: skip
    gradients = [
        (g if g.dtype == t.dtype else g.to(t.dtype)) if wanted and g is not None else None
        for g, t, wanted in zip(found, tensors[:8], need, strict=True)
    ]
    return (d_x, *gradients, None, None, None, None)
