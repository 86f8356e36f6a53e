"""The bidirectional selective scan in plain PyTorch: the truth that every kernel is tested against.

    delta_t = softplus(dt_t W_dt^T + b_dt)
    h_t     = exp(delta_t A) h_{t-1} + delta_t B_t u_t           discretised, one per direction
    y       = sum over directions of (C_t . h_t + D u_t)
    out     = scale * y * SiLU(z)

Shapes in this file

    batch    images in the batch
    L        tokens, class token included
    d_inner  channels inside the mixer
    d_state  SSM states per channel
    dt_rank  rank of the time-step projection
    K        directions: 1 or 2; "per direction" is a tuple with K entries

A reversed direction walks t from L-1 down to 0 over the same, unflipped tensors.

Source of the recurrence: Mamba (arXiv 2312.00752, section 3.3 and algorithm 2); of the sum and the
division by two: hustvl/Vim, mamba_simple.py, bimamba_type "v2".
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library


def scan(
    u: Sequence[Tensor],
    dt: Sequence[Tensor],
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    z: Tensor | None,
    A_log: Sequence[Tensor],
    D: Sequence[Tensor] | None,
    dt_weight: Sequence[Tensor] | None,
    dt_bias: Sequence[Tensor] | None,
    *,
    reverse: Sequence[bool],
    softplus: bool = True,
    scale: float = 1.0,
    A_is_log: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scan all directions, add them and gate the sum. Differentiable in every tensor.

    Args:
        u: per direction, float (batch, L, d_inner): the convolved input.
        dt: per direction, (batch, L, dt_rank) where `dt_weight` is given, else (batch, L, d_inner).
        B, C: per direction, (batch, L, d_state).
        z: gate before its SiLU, (batch, L, d_inner), or None for no gate.
        A_log: per direction, (d_inner, d_state), with A = -exp(A_log); A itself if not `A_is_log`.
        D: per direction, (d_inner,), the skip connection, or None.
        dt_weight: per direction, (d_inner, dt_rank), or None.
        dt_bias: per direction, (d_inner,), or None.
        reverse: per direction, True where the scan runs from the last token to the first.
        softplus: whether delta passes through softplus (the identity above 20).
        scale: factor of the output; 0.5 where Vim divides the two directions by two.

    Returns:
        `out` (batch, L, d_inner) and `y`, the unscaled sum before the gate, both in u's dtype.
        The state and every sum are in float32, or in float64 where the inputs are.
    """
    compute = torch.promote_types(u[0].dtype, torch.float32)
    inputs, deltas, decays = [], [], []
    for k in range(len(u)):
        delta = dt[k].to(compute)
        if dt_weight is not None:
            delta = delta @ dt_weight[k].to(compute).T
        if dt_bias is not None:
            delta = delta + dt_bias[k].to(compute)
        deltas.append(F.softplus(delta) if softplus else delta)
        inputs.append(u[k].to(compute))
        rate = A_log[k].to(compute)
        decays.append(-torch.exp(rate) if A_is_log else rate)

    def stacked(per_direction: Sequence[Tensor]) -> Tensor:
        """(K, batch, L, ...) in scan order, so that one loop serves both directions."""
        return torch.stack(
            [x.flip(1) if back else x for x, back in zip(per_direction, reverse, strict=True)]
        )

    states, _ = _recurrence(
        stacked(inputs),
        stacked(deltas),
        torch.stack(decays),
        stacked([b.to(compute) for b in B]),
        stacked([c.to(compute) for c in C]),
    )
    y = torch.zeros_like(inputs[0])
    for k, back in enumerate(reverse):
        y = y + (states[k].flip(1) if back else states[k])
        if D is not None:
            y = y + D[k].to(compute) * inputs[k]
    out = y * scale
    if z is not None:
        out = out * F.silu(z.to(compute))
    return out.to(u[0].dtype), y.to(u[0].dtype)


# The recurrence is an op because a compiler would otherwise unroll the loop over the tokens; its
# backward recomputes the states. Autograd over the plain loop keeps L states of (K, batch, d_inner,
# d_state): 14 GiB for one training step of Vim-Small at batch 8. Here about sqrt(L) of them are
# kept, and the states between two of them are computed again when the backward pass gets there.
@library.custom_op("svp_peft::recurrence", mutates_args=())
def _recurrence(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """y_t = C_t . h_t, and the state before every `_chunk(L)`-th step.

    u, delta (K, batch, L, d_inner), A (K, d_inner, d_state), B, C (K, batch, L, d_state).
    """
    length = u.shape[2]
    chunk = _chunk(length)
    h = u.new_zeros(*u.shape[:2], u.shape[3], A.shape[2])
    y = torch.empty_like(u)
    starts = h.new_empty(-(-length // chunk), *h.shape)
    for t in range(length):
        if t % chunk == 0:
            starts[t // chunk] = h
        h = _step(h, u, delta, A, B, t)
        y[:, :, t] = torch.einsum("kbdn,kbn->kbd", h, C[:, :, t])
    return y, starts


@library.custom_op("svp_peft::recurrence_backward", mutates_args=())
def _recurrence_backward(
    grad_y: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (u, delta, A, B, C)."""
    length = u.shape[2]
    chunk = _chunk(length)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dA, dB, dC = torch.zeros_like(A), torch.empty_like(B), torch.empty_like(C)
    adjoint = torch.zeros_like(starts[0])  # dLoss/dh_t, from the steps after t
    for index in range(len(starts) - 1, -1, -1):
        begin = index * chunk
        end = min(begin + chunk, length)
        states = [starts[index]]  # states[t - begin] = h_{t-1}
        for t in range(begin, end):
            states.append(_step(states[-1], u, delta, A, B, t))
        for t in range(end - 1, begin - 1, -1):
            before, h = states[t - begin], states[t - begin + 1]
            adjoint = adjoint + grad_y[:, :, t, :, None] * C[:, :, t, None]
            dC[:, :, t] = torch.einsum("kbdn,kbd->kbn", h, grad_y[:, :, t])
            input_gradient = torch.einsum("kbdn,kbn->kbd", adjoint, B[:, :, t])
            du[:, :, t] = input_gradient * delta[:, :, t]
            dB[:, :, t] = torch.einsum("kbdn,kbd->kbn", adjoint, delta[:, :, t] * u[:, :, t])
            # d exp(delta A) = exp(delta A) (A ddelta + delta dA); `carried` serves both
            decay = torch.exp(delta[:, :, t, :, None] * A[:, None])
            carried = adjoint * decay * before
            ddelta[:, :, t] = input_gradient * u[:, :, t] + torch.einsum(
                "kbdn,kdn->kbd", carried, A
            )
            dA += torch.einsum("kbdn,kbd->kdn", carried, delta[:, :, t])
            adjoint = adjoint * decay
    return du, ddelta, dA, dB, dC


@_recurrence.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    length = u.shape[2]
    starts = u.new_empty(-(-length // _chunk(length)), *u.shape[:2], u.shape[3], A.shape[2])
    return torch.empty_like(u), starts


@_recurrence_backward.register_fake
def _(grad_y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in inputs[:5])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return _recurrence_backward(grad_y, *ctx.saved_tensors)


_recurrence.register_autograd(_differentiate, setup_context=_save)


def _chunk(length: int) -> int:
    """Steps between two kept states: a square root balances those kept and those recomputed."""
    return max(1, math.isqrt(length))


def _step(h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, t: int) -> Tensor:
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, (K, batch, d_inner, d_state)."""
    decay = torch.exp(delta[:, :, t, :, None] * A[:, None])
    return decay * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, :, t, None]
