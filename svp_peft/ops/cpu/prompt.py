"""The SVP prompts in C++, from the prompters' outputs on: csrc/tokens.cpp; float32."""

from collections.abc import Sequence

import torch
from torch import Tensor

from svp_peft.ops.cpu.call import Call


def prompt(
    x: Tensor,
    cross: Tensor | None,
    inner: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    skip: Sequence[int],
) -> Tensor:
    """`svp_peft.ops.reference.prompt`, without a derivative."""
    out = x.new_empty(x.shape)
    positions = torch.tensor(list(skip), dtype=torch.int64)
    call = Call()
    call.numbers(*x.shape)
    for tensor in (x, cross, inner):
        call.rows(tensor)
    call.parameters(alpha, beta)
    call.numbers(positions.data_ptr(), len(skip))
    call.rows(out)
    if x.numel() > 0:
        call.run("svp_prompt_forward")
    return out


def prompt_backward(
    grad: Tensor,
    cross: Tensor | None,
    inner: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    skip: Sequence[int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of cross, inner, alpha and beta; x's is `grad` itself."""

    d_cross, d_inner = (
        None if t is None else t.new_empty(t.shape, dtype=torch.float32) for t in (cross, inner)
    )
    # sums over the tokens, of which there may be none
    d_alpha, d_beta = (
        None if t is None or scale is None else scale.new_zeros(scale.shape, dtype=torch.float32)
        for t, scale in ((cross, alpha), (inner, beta))
    )
    positions = torch.tensor(list(skip), dtype=torch.int64)
    call = Call()
    call.numbers(*grad.shape)
    for tensor in (grad, cross, inner):
        call.rows(tensor)
    call.parameters(alpha, beta)
    call.numbers(positions.data_ptr(), len(skip))
    for tensor in (d_cross, d_inner):
        call.rows(tensor)
    call.parameters(d_alpha, d_beta)
    if grad.numel() > 0:
        call.run("svp_prompt_backward")
    return d_cross, d_inner, d_alpha, d_beta
