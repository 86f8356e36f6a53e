"""Shapes that do not fit are refused here: a kernel would read and write beyond a tensor's end."""

from collections.abc import Sequence

from torch import Tensor

from svp_peft.errors import InputError

Shape = tuple[int, ...]


def expect(given: str, **tensors: tuple[Tensor | None, Shape]) -> None:
    """Raise `InputError` unless each tensor that is there has its shape.

    Args:
        given: what the shapes follow from, for the message.
        tensors: by name, a tensor or None and the shape that it should have.
    """
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)} and should have {tuple(shape)}, given "
                f"{given}. Check which of them is wrong."
            )


def expect_scan(
    u: Sequence[Tensor],
    dt: Sequence[Tensor],
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    z: Tensor | None,
    A_log: Sequence[Tensor],
    D: Sequence[Tensor] | None,
    dt_weight: Sequence[Tensor] | None,
    dt_bias: Sequence[Tensor] | None,
    reverse: Sequence[bool],
) -> None:
    """Raise `InputError` unless these are arguments of `svp_peft.ops.reference.scan`."""
    _expect_one_each(
        reverse, u=u, dt=dt, B=B, C=C, A_log=A_log, D=D, dt_weight=dt_weight, dt_bias=dt_bias
    )
    if u[0].dim() != 3 or A_log[0].dim() != 2:
        raise InputError(
            f"u has shape {tuple(u[0].shape)} and A_log {tuple(A_log[0].shape)}: the scan takes "
            f"u (batch, L, d_inner) and A_log (d_inner, d_state)."
        )
    batch, length, d_inner = u[0].shape
    rows, d_state = (batch, length), A_log[0].shape[1]
    rank = d_inner if dt_weight is None else dt_weight[0].shape[-1]
    given = f"u {tuple(u[0].shape)} and A_log {tuple(A_log[0].shape)}"
    for k in range(len(reverse)):
        expect(
            given,
            u=(u[k], (*rows, d_inner)),
            dt=(dt[k], (*rows, rank)),
            B=(B[k], (*rows, d_state)),
            C=(C[k], (*rows, d_state)),
            A_log=(A_log[k], (d_inner, d_state)),
            D=(None if D is None else D[k], (d_inner,)),
            dt_weight=(None if dt_weight is None else dt_weight[k], (d_inner, rank)),
            dt_bias=(None if dt_bias is None else dt_bias[k], (d_inner,)),
        )
    expect(given, z=(z, (*rows, d_inner)))


def expect_conv(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor] | None, reverse: Sequence[bool]
) -> None:
    """Raise `InputError` unless these are arguments of `svp_peft.ops.reference.conv_silu`."""
    _expect_one_each(reverse, weight=weight, bias=bias)
    if x.dim() != 3 or weight[0].dim() != 2:
        raise InputError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight[0].shape)}: the convolution "
            f"takes x (batch, L, d_inner) and weight (d_inner, width)."
        )
    d_inner, width = x.shape[2], weight[0].shape[1]
    for k in range(len(reverse)):
        expect(
            f"x {tuple(x.shape)}",
            weight=(weight[k], (d_inner, width)),
            bias=(None if bias is None else bias[k], (d_inner,)),
        )


def _expect_one_each(reverse: Sequence[bool], **groups: Sequence[Tensor] | None) -> None:
    for name, group in groups.items():
        if group is not None and len(group) != len(reverse):
            raise InputError(
                f"{name} has {len(group)} tensors for {len(reverse)} directions. Pass one for "
                f"each direction."
            )
