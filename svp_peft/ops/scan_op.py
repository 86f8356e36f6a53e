"""The selective scan and the convolution as differentiable ops on any backend.

`selective_scan` is the public one, in mamba-ssm's layout. `scan` and `conv_silu` are channels-last
and take both directions at once; the mixer calls them one by one where a projection is wrapped
(LoRA, hooks) and the whole-mixer op would bypass it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from svp_peft.errors import InputError
from svp_peft.ops.backends import choose, kernels
from svp_peft.ops.scan_passes import (
    EagerConv,
    EagerScan,
    conv_backward,
    conv_forward,
    scan_backward,
    scan_forward,
)
from svp_peft.ops.shapes import expect, expect_conv, expect_scan


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """One direction of the selective scan, in the layout of mamba-ssm's `selective_scan_fn`.

        delta_t = softplus(delta_t + delta_bias)
        h_t     = exp(delta_t A) h_{t-1} + delta_t B_t u_t
        out_t   = (C_t . h_t + D u_t) * SiLU(z_t)

    Args:
        u, delta, z: float32, bfloat16, float16 or float64, (batch, d_inner, L); z may be None.
        A: (d_inner, d_state), negative for a state that decays.
        B, C: (batch, d_state, L).
        D, delta_bias: (d_inner,) or None.
        delta_softplus: whether delta passes through softplus (the identity above 20).
        reverse: scan from the last token to the first; nothing is flipped.
        backend: see `svp_peft.set_backend`. "auto" takes the process default.

    Returns:
        (batch, d_inner, L) in u's dtype. State and sums are float32 (float64 for float64 inputs).
        Differentiable in every tensor.

    Raises:
        InputError: shapes that do not fit together, or a tensor that is not real and floating.
        BackendError: a backend was named that cannot run on these tensors.
    """
    _check(u, delta, A, B, C, D, z, delta_bias)
    name = choose(None if backend == "auto" else backend, u.device, u.dtype)

    def channels_last(x: Tensor) -> Tensor:
        return x.to(u.dtype).transpose(1, 2).contiguous()

    out, _ = scan(
        [channels_last(u)],
        [channels_last(delta)],
        [channels_last(B)],
        [channels_last(C)],
        None if z is None else channels_last(z),
        [A],
        None if D is None else [D],
        None,
        None if delta_bias is None else [delta_bias],
        reverse=(reverse,),
        softplus=delta_softplus,
        A_is_log=False,
        backend=name,
    )
    return out.transpose(1, 2)


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`svp_peft.ops.reference.scan` on a backend: same arguments, same results.

    Raises:
        InputError: shapes that do not fit together.
        BackendError: a backend was named that cannot run on these tensors.
    """
    expect_scan(u, dt, B, C, z, A_log, D, dt_weight, dt_bias, reverse)
    name = choose(backend, u[0].device, u[0].dtype)
    if name in ("reference", "mamba_ssm"):
        with torch.autocast(u[0].device.type, enabled=False):
            return kernels(name).scan(
                u, dt, B, C, z, A_log, D, dt_weight, dt_bias,
                reverse=reverse, softplus=softplus, scale=scale, A_is_log=A_is_log,
            )  # fmt: skip
    groups = [
        [*group] if group else [] for group in (u, dt, B, C, None, A_log, D, dt_weight, dt_bias)
    ]
    settings = ([*reverse], softplus, scale, A_is_log, name)
    if _is_traced():
        return _scan(*groups[:4], z, *groups[5:], *settings)  # type: ignore[no-any-return]
    groups[4] = [] if z is None else [z]
    sizes = tuple([len(group) for group in groups])
    flat = [tensor for group in groups for tensor in group]
    return EagerScan.apply(sizes, settings, *flat)  # type: ignore[no-any-return]


def conv_silu(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    reverse: Sequence[bool],
    *,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`svp_peft.ops.reference.conv_silu` on a backend: same arguments, same results.

    Raises:
        InputError: shapes that do not fit together.
        BackendError: a backend was named that cannot run on these tensors.
    """
    expect_conv(x, weight, bias, reverse)
    name = choose(backend, x.device, x.dtype)
    if name in ("reference", "mamba_ssm"):
        with torch.autocast(x.device.type, enabled=False):
            return kernels(name).conv_silu(x, weight, bias, reverse)
    if _is_traced():
        return tuple(_conv_silu(x, [*weight], [*(bias or ())], [*reverse], name))
    return EagerConv.apply(([*reverse], name), x, *weight, *(bias or ()))  # type: ignore[no-any-return]


def _is_traced() -> bool:
    """Whether a compiler or a functorch transform has to see an op."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


# schemas are written out: torch 2.4 cannot read `list[Tensor]` and `Tensor | None` off a signature
_SCAN_INPUTS = "Tensor[] u, Tensor[] dt, Tensor[] B, Tensor[] C, Tensor? z"
_SCAN_PARAMETERS = (
    "Tensor[] A_log, Tensor[] D, Tensor[] dt_weight, Tensor[] dt_bias, "
    "bool[] reverse, bool softplus, float scale, bool A_is_log, str backend"
)


_scan = library.custom_op(
    "svp_peft::scan",
    scan_forward,
    mutates_args=(),
    schema=f"({_SCAN_INPUTS}, {_SCAN_PARAMETERS}) -> (Tensor, Tensor)",
)


@_scan.register_fake
def _(u: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return u[0].new_empty(u[0].shape), u[0].new_empty(u[0].shape)


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *groups, reverse, softplus, scale, A_is_log, backend = inputs
    ctx.sizes = [0 if g is None else 1 if isinstance(g, Tensor) else len(g) for g in groups]
    flat = [t for g in groups if g is not None for t in ([g] if isinstance(g, Tensor) else g)]
    ctx.save_for_backward(*flat, output[1])
    ctx.settings = (reverse, softplus, scale, A_is_log, backend)
    # y is handed out for the backward pass alone
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _scan_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 14
    *tensors, y = ctx.saved_tensors
    pieces = iter(tensors)
    groups = [[next(pieces) for _ in range(size)] for size in ctx.sizes]
    wanted = [any(n) if isinstance(n, list | tuple) else bool(n) for n in ctx.needs_input_grad[:9]]
    gate = groups[4][0] if groups[4] else None
    found = iter(
        _scan_backward_op(
            grad, *groups[:4], gate, y, *groups[5:], *ctx.settings, wanted,
        )
    )  # fmt: skip
    gradients: list[Any] = [
        [next(found) if needed else None for _ in group]
        for group, needed in zip(groups, wanted, strict=True)
    ]
    gradients[4] = gradients[4][0] if groups[4] else None
    return (*gradients, None, None, None, None, None)


_scan_backward_op = library.custom_op(
    "svp_peft::scan_backward",
    lambda *arguments: [_own(x) for x in scan_backward(*arguments)],
    mutates_args=(),
    schema=f"(Tensor grad, {_SCAN_INPUTS}, Tensor y, {_SCAN_PARAMETERS}, bool[] needs) -> Tensor[]",
)


@_scan_backward_op.register_fake
def _(grad: Tensor, *arguments: Any) -> list[Tensor]:
    *groups, _, _, _, _, _, needs = arguments
    groups[4] = [] if groups[4] is None else [groups[4]]
    del groups[5]  # y
    wanted = [t for group, needed in zip(groups, needs, strict=True) if needed for t in group]
    return [t.new_empty(t.shape) for t in wanted]


_scan.register_autograd(_scan_backward, setup_context=_scan_setup)


_conv_silu = library.custom_op(
    "svp_peft::conv_silu",
    conv_forward,
    mutates_args=(),
    schema="(Tensor x, Tensor[] weight, Tensor[] bias, bool[] reverse, str backend) -> Tensor[]",
)


@_conv_silu.register_fake
def _(x: Tensor, weight: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for _ in weight]


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, bias, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(x, *weight, *bias)


def _conv_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, *parameters = ctx.saved_tensors
    count = len(ctx.reverse)
    weight, bias = parameters[:count], parameters[count:]
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    needs = [bool(need_x), any(need_weight), any(need_bias)]
    found = iter(_conv_backward_op(grads, x, weight, bias, ctx.reverse, ctx.backend, needs))
    dx, d_weight, d_bias = (
        [next(found) if needed else None for _ in group]
        for group, needed in zip(([x], weight, bias), needs, strict=True)
    )
    return dx[0], d_weight, d_bias, None, None


_conv_backward_op = library.custom_op(
    "svp_peft::conv_silu_backward",
    lambda *arguments: [_own(x) for x in conv_backward(*arguments)],
    mutates_args=(),
    schema="(Tensor[] grads, Tensor x, Tensor[] weight, Tensor[] bias, bool[] reverse, "
    "str backend, bool[] needs) -> Tensor[]",
)


@_conv_backward_op.register_fake
def _(
    grads: list[Tensor],
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    reverse: list[bool],
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    groups = zip(([x], weight, bias), needs, strict=True)
    return [t.new_empty(t.shape) for group, needed in groups if needed for t in group]


_conv_silu.register_autograd(_conv_backward, setup_context=_conv_setup)


def _own(x: Tensor) -> Tensor:
    """x alone in its storage: the results of an op may not share one."""
    alone = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if alone else x.clone(memory_format=torch.contiguous_format)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.dim() != 3 or A.dim() != 2:
        raise InputError(
            f"u has shape {tuple(u.shape)} and A {tuple(A.shape)}: selective_scan takes "
            f"u (batch, d_inner, L) and A (d_inner, d_state)."
        )
    batch, d_inner, length = u.shape
    d_state = A.shape[1]
    expect(
        f"u {tuple(u.shape)} and A {tuple(A.shape)}",
        delta=(delta, (batch, d_inner, length)),
        A=(A, (d_inner, d_state)),
        B=(B, (batch, d_state, length)),
        C=(C, (batch, d_state, length)),
        D=(D, (d_inner,)),
        z=(z, (batch, d_inner, length)),
        delta_bias=(delta_bias, (d_inner,)),
    )
    named = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "bias": delta_bias}
    for name, tensor in named.items():
        if tensor is not None and not tensor.is_floating_point():
            raise InputError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}: the scan is over real "
                f"numbers, unlike mamba-ssm's, which has a complex one too. Convert it to float32."
            )
