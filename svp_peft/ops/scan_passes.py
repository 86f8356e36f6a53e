"""The scan and the convolution forwards and backwards, and as functions of eager autograd.

A custom op with lists of tensors takes a slow host longer than the kernels of a small batch run:
eager mode goes through an `autograd.Function`, a compiler sees the ops of `scan_op.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svp_peft.ops.backends import kernels
from svp_peft.ops.derivatives import refuse_second
from svp_peft.ops.types import ScanNeeds


def scan_forward(
    u: list[Tensor],
    dt: list[Tensor],
    B: list[Tensor],
    C: list[Tensor],
    z: Tensor | None,
    A_log: list[Tensor],
    D: list[Tensor],
    dt_weight: list[Tensor],
    dt_bias: list[Tensor],
    reverse: list[bool],
    softplus: bool,
    scale: float,
    A_is_log: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return kernels(backend).scan(
        tuple(u), tuple(dt), tuple(B), tuple(C), z, tuple(A_log), tuple(D) or None,
        tuple(dt_weight) or None, tuple(dt_bias) or None,
        reverse=tuple(reverse), softplus=softplus, scale=scale, A_is_log=A_is_log, save_y=True,
    )  # fmt: skip


def scan_backward(
    grad: Tensor,
    u: list[Tensor],
    dt: list[Tensor],
    B: list[Tensor],
    C: list[Tensor],
    z: Tensor | None,
    y: Tensor,
    A_log: list[Tensor],
    D: list[Tensor],
    dt_weight: list[Tensor],
    dt_bias: list[Tensor],
    reverse: list[bool],
    softplus: bool,
    scale: float,
    A_is_log: bool,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the groups that `needs` names, one tensor after the other."""
    found = kernels(backend).scan_backward(
        grad.contiguous(), tuple(u), tuple(dt), tuple(B), tuple(C), z, y,
        tuple(A_log), tuple(D) or None, tuple(dt_weight) or None, tuple(dt_bias) or None,
        reverse=tuple(reverse), softplus=softplus, scale=scale, A_is_log=A_is_log,
        need=ScanNeeds(*needs),
    )  # fmt: skip
    groups = (u, dt, B, C, [] if z is None else [z], A_log, D, dt_weight, dt_bias)
    gradients: list[Tensor] = []
    for gradient, group, needed in zip(found, groups, needs, strict=True):
        if needed and group:
            several = (gradient,) if isinstance(gradient, Tensor) else gradient
            gradients += [g.to(t.dtype) for g, t in zip(several, group, strict=True)]
    return gradients


def conv_forward(
    x: Tensor, weight: list[Tensor], bias: list[Tensor], reverse: list[bool], backend: str
) -> list[Tensor]:
    return list(kernels(backend).conv_silu(x, tuple(weight), tuple(bias) or None, tuple(reverse)))


def conv_backward(
    grads: list[Tensor],
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    reverse: list[bool],
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, of the weights and of the biases, those that `needs` names."""
    dx, d_weight, d_bias = kernels(backend).conv_silu_backward(
        tuple(g.contiguous() for g in grads), x, tuple(weight), tuple(bias) or None,
        tuple(reverse), need_x=needs[0], need_weight=needs[1], need_bias=needs[2],
    )  # fmt: skip
    found = [*([] if dx is None else [dx]), *(d_weight or ()), *(d_bias or ())]
    groups = zip(([x], weight, bias), needs, strict=True)
    wanted = [t for group, needed in groups if needed for t in group]
    return [g.to(t.dtype) for g, t in zip(found, wanted, strict=True)]


class EagerScan(torch.autograd.Function):
    """`scan_forward` with `scan_backward` as its derivative.

    Takes the number of tensors of each group (u, dt, B, C, z, A_log, D, dt_weight, dt_bias), the
    settings from `reverse` on, and the tensors one after the other; returns out and y.
    """

    @staticmethod
    def forward(ctx: Any, sizes: tuple[int, ...], settings: Any, *tensors: Tensor) -> Any:
        groups = _split(tensors, sizes)
        gate = groups[4][0] if groups[4] else None
        run: Any = scan_forward
        out, y = run(*groups[:4], gate, *groups[5:], *settings)
        ctx.sizes, ctx.settings = sizes, settings
        ctx.save_for_backward(*tensors, y)
        # y is handed out for the backward pass alone
        ctx.mark_non_differentiable(y)
        ctx.set_materialize_grads(False)
        return out, y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
        refuse_second()
        if grad is None:
            return (None,) * (2 + sum(ctx.sizes))
        *tensors, y = ctx.saved_tensors
        groups = _split(tensors, ctx.sizes)
        wanted = [any(group) for group in _split(ctx.needs_input_grad[2:], ctx.sizes)]
        gate = groups[4][0] if groups[4] else None
        run: Any = scan_backward
        found = iter(run(grad, *groups[:4], gate, y, *groups[5:], *ctx.settings, wanted))
        return (
            None,
            None,
            *(
                next(found) if needed else None
                for group, needed in zip(groups, wanted, strict=True)
                for _ in group
            ),
        )


class EagerConv(torch.autograd.Function):
    """`conv_forward` with `conv_backward` as its derivative.

    Takes the settings (reverse, backend), x, the weights of the directions and then their biases.
    """

    @staticmethod
    def forward(ctx: Any, settings: tuple[list[bool], str], x: Tensor, *parameters: Tensor) -> Any:
        count = len(settings[0])
        ctx.settings = settings
        ctx.save_for_backward(x, *parameters)
        return tuple(conv_forward(x, [*parameters[:count]], [*parameters[count:]], *settings))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        refuse_second()
        x, *parameters = ctx.saved_tensors
        count = len(ctx.settings[0])
        weight, bias = parameters[:count], parameters[count:]
        _, need_x, *need = ctx.needs_input_grad
        reverse, backend = ctx.settings
        wanted = [need_x, any(need[:count]), any(need[count:])]
        found = iter(conv_backward([*grads], x, weight, bias, reverse, backend, wanted))
        groups = zip(([x], weight, bias), wanted, strict=True)
        return None, *(next(found) if needed else None for group, needed in groups for _ in group)


def _split(flat: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
    rest = iter(flat)
    return [[next(rest) for _ in range(size)] for size in sizes]
