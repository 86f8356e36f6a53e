"""The two SVP prompts in plain PyTorch: the formula of the paper, and that of the released code.

    out_t = x_t + alpha * SiLU(cross_t) + beta * SiLU(inner_t)      t = every token not in `skip`

`cross` and `inner` are the prompters' outputs before their activation; `prompters.py` says what
they are made of.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def prompt(
    x: Tensor,
    cross: Tensor | None,
    inner: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    skip: Sequence[int],
    *,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Add the prompts to every token except those at the positions in `skip`.

    Args:
        x: tokens entering a block, float (batch, L, d_model). Not modified.
        cross, inner: prompter outputs before the activation, like x; None leaves that prompt out.
        alpha, beta: learned scales, (d_model,); needed where `cross`, `inner` are given.
        skip: positions of the class tokens, each in 0..L-1.
        drop: applied to each activated prompt, inner first, as the released code does.

    Returns:
        Prompted tokens in x's dtype. Equal to x bit for bit where alpha = beta = 0.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    added = None
    for pre_activation, scale in ((inner, beta), (cross, alpha)):
        if pre_activation is None or scale is None:
            continue
        activated = F.silu(pre_activation.to(compute))
        if drop is not None:
            activated = drop(activated)
        term = activated * scale.to(compute)
        added = term if added is None else added + term
    if added is None:
        return x
    prompted = x.to(compute) + added
    if skip:
        keep = positions_mask(x.shape[1], skip, x.device)
        prompted = torch.where(keep[:, None], x.to(compute), prompted)
    return prompted.to(x.dtype)


def positions_mask(length: int, positions: Sequence[int], device: torch.device) -> Tensor:
    """bool (length,): True at `positions`, each in 0..length-1.

    Nothing is copied from the host, as an index list would be: that waits for the GPU, and is
    refused while a CUDA graph is captured.
    """
    mask = torch.zeros(length, dtype=torch.bool, device=device)
    for position in positions:
        mask.narrow(0, position, 1).fill_(True)
    return mask


def prompt_released(
    x: Tensor,
    cross_of: Callable[[Tensor], Tensor],
    inner_of: Callable[[Tensor], Tensor],
    alpha: Tensor,
    beta: Tensor,
    position: int,
    *,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Add the prompts as the released SVP code does: the second half sees the prompted first half.

        first'  = first  + beta * SiLU(inner(first))  + alpha * SiLU(cross(first))
        second' = second + beta * SiLU(inner(second)) + alpha * SiLU(cross(first'))

    `first` and `second` are the tokens before and after the class token; token j of the second
    half gets the cross prompt of token j of the prompted first half.

    Args:
        x: tokens entering a block, float (batch, 2 * position + 1, d_model). Not modified.
        cross_of, inner_of: the prompters without their activation, tokens -> tokens.
        alpha, beta: learned scales, (d_model,).
        position: index of the class token; both halves have this many tokens.
        drop: dropout of the prompts, drawn in the released order: inner(first), cross(first),
            inner(second), cross(first').

    Source: zhoujiahuan1991/AAAI2025-SVP at 5ea376c, models_mamba.py lines 498-518.
    """
    first, special, second = x[:, :position], x[:, position : position + 1], x[:, position + 1 :]
    keep = drop if drop is not None else _identity

    def prompted(tokens: Tensor, cross_input: Tensor) -> Tensor:
        tokens_with_inner = tokens + keep(F.silu(inner_of(tokens))) * beta
        return (tokens_with_inner + keep(F.silu(cross_of(cross_input))) * alpha).to(x.dtype)

    first = prompted(first, first)
    second = prompted(second, first)
    return torch.cat((first, special, second), dim=1)


def _identity(x: Tensor) -> Tensor:
    return x
