"""The Vim mixer as one op: what it saves, what it recomputes, which gradients it makes.

The kernels come from a backend (`svp_peft.ops.cpu`, `.cuda`, `.triton`); the projections are
matrix products by PyTorch. The forward pass returns, beside its output, what the backward pass
reads again; what is left out there is recomputed:

    keep = 0   nothing                      inference
    keep = 1   x_dbl, y                     y, the sum of the scans, spares a scan for dz
    keep = 2   x_dbl, y, xz, u              also spares in_proj and the convolutions

The backward pass makes exactly the gradients asked for: with a frozen backbone that is the one of
the input, and no product that makes a weight's gradient is ever formed.

Eager mode runs an `autograd.Function`; under `torch.compile` and `torch.export` the same functions
are the op `svp_peft::mixer`, which the compiler sees as one node.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from svp_peft.ops.backends import choose, kernels
from svp_peft.ops.casting import cast, compute_dtype
from svp_peft.ops.types import MixerWeights, ScanNeeds

# up to this many elements of xz per block everything is kept. On a GPU: at Vim-Small's width 20
# images of 224 x 224, 0.6 GiB over 24 blocks in bfloat16; larger batches trade time for memory. A
# CPU has the memory, and a product costs it far more
_KEEP_EVERYTHING = {"cuda": 6_000_000, "cpu": 1 << 62}


def mixer(
    hidden: Tensor, weights: MixerWeights, *, scale: float = 1.0, backend: str | None = None
) -> Tensor:
    """The mixer of one Vim block: in_proj, convolutions, scans in both directions, gate, out_proj.

    The formula is in `svp_peft.ops.reference.mixer`. Under autocast the matrix products and the
    result are in the autocast dtype; states and sums are in float32.

    Args:
        hidden: float (batch, L, d_model), normalised tokens. Any L from 1 on.
        weights: the mixer's tensors; see `MixerWeights`.
        scale: 0.5 where the sum of two directions is divided by two.
        backend: see `svp_peft.set_backend`; None takes the process default.

    Returns:
        (batch, L, d_model), in the autocast dtype or hidden's.

    Raises:
        BackendError: a backend was named that cannot run on these tensors.
    """
    dtype = compute_dtype(hidden)
    # the C++ kernels are float32: a CPU gains nothing from half precision in a scan
    working = torch.float32 if hidden.device.type == "cpu" and dtype.itemsize == 2 else dtype
    name = choose(backend, hidden.device, working)
    if name in ("reference", "mamba_ssm"):
        with torch.autocast(hidden.device.type, enabled=False):
            return kernels(name).mixer(hidden.to(dtype), weights, scale=scale)
    tensors = _pack(weights)
    keep = 0
    if torch.is_grad_enabled() and (
        hidden.requires_grad or any(t is not None and t.requires_grad for t in tensors)
    ):
        elements = hidden.shape[0] * hidden.shape[1] * weights.in_proj_weight.shape[0]
        keep = 2 if elements <= _KEEP_EVERYTHING.get(hidden.device.type, 0) else 1
    run = _mixer_op if torch.compiler.is_compiling() else _Mixer.apply
    return run(hidden, *tensors, scale, working, name, keep)[0].to(dtype)


def _pack(w: MixerWeights) -> tuple[Tensor | None, ...]:
    """The tensors in the order of the op's arguments; a missing direction or bias is None."""

    def two(pair: tuple[Tensor, ...] | None) -> tuple[Tensor | None, Tensor | None]:
        if pair is None:
            return None, None
        return pair[0], pair[1] if len(pair) == 2 else None

    return (
        w.in_proj_weight,
        w.in_proj_bias,
        *two(w.conv_weight),
        *two(w.conv_bias),
        *two(w.x_proj_weight),
        *two(w.dt_weight),
        *two(w.dt_bias),
        *two(w.A_log),
        *two(w.D),
        w.out_proj_weight,
        w.out_proj_bias,
    )


def _unpack(flat: tuple[Any, ...]) -> MixerWeights:
    """The inverse of `_pack`."""

    def pair(i: int) -> tuple[Any, ...]:
        return (flat[i],) if flat[i + 1] is None else (flat[i], flat[i + 1])

    return MixerWeights(
        in_proj_weight=flat[0],
        in_proj_bias=flat[1],
        conv_weight=pair(2),
        conv_bias=None if flat[4] is None else pair(4),
        x_proj_weight=pair(6),
        dt_weight=pair(8),
        dt_bias=pair(10),
        A_log=pair(12),
        D=pair(14),
        out_proj_weight=flat[16],
        out_proj_bias=flat[17],
    )


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(rows, in) -> (rows, out) in `dtype`."""
    if bias is None:
        return torch.mm(rows, cast(weight, dtype).T)
    return torch.addmm(cast(bias, dtype), rows, cast(weight, dtype).T)


def _in_projection(hidden: Tensor, w: MixerWeights, dtype: torch.dtype) -> Tensor:
    """xz, (batch, L, 2 * d_inner)."""
    rows = hidden.to(dtype).reshape(-1, hidden.shape[-1])
    return _linear(rows, w.in_proj_weight, w.in_proj_bias, dtype).view(*hidden.shape[:2], -1)


def _convolve(xz: Tensor, w: MixerWeights, backend: str) -> tuple[Tensor, ...]:
    """u per convolution, (batch, L, d_inner)."""
    x = xz[..., : xz.shape[-1] // 2]
    return kernels(backend).conv_silu(x, w.conv_weight, w.conv_bias, w.conv_reverse)


def _scan_arguments(
    u: tuple[Tensor, ...], x_dbl: Tensor, w: MixerWeights
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(u, dt, B, C) and (A_log, D, dt_weight, dt_bias), each per scan; dt, B, C view x_dbl."""
    dt_rank, d_state = w.dt_weight[0].shape[1], w.A_log[0].shape[1]
    pick = w.source_of_direction
    activations = (
        tuple(u[k] for k in pick),
        tuple(x_dbl[k, ..., :dt_rank] for k in pick),
        tuple(x_dbl[k, ..., dt_rank : dt_rank + d_state] for k in pick),
        tuple(x_dbl[k, ..., dt_rank + d_state :] for k in pick),
    )
    parameters = (
        w.A_log,
        tuple(w.D[k] for k in pick),
        tuple(w.dt_weight[k] for k in pick),
        tuple(w.dt_bias[k] for k in pick),
    )
    return activations, parameters


def _forward(hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """(out, x_dbl, y, xz, u, u of the second convolution); what `keep` leaves out is empty."""
    *tensors, scale, dtype, backend, keep = arguments
    w = _unpack(tuple(tensors))
    batch, length, _ = hidden.shape
    with torch.autocast(hidden.device.type, enabled=False):
        xz = _in_projection(hidden, w, dtype)
        u = _convolve(xz, w, backend)
        d_inner = xz.shape[-1] // 2
        x_dbl = xz.new_empty(len(u), batch, length, w.x_proj_weight[0].shape[0])
        for k, u_k in enumerate(u):
            weight = cast(w.x_proj_weight[k], dtype)
            torch.mm(u_k.view(-1, d_inner), weight.T, out=x_dbl[k].view(batch * length, -1))
        activations, parameters = _scan_arguments(u, x_dbl, w)
        gated, y = kernels(backend).scan(
            *activations,
            xz[..., d_inner:],
            *parameters,
            reverse=w.scan_reverse,
            softplus=True,
            scale=scale,
            save_y=keep > 0,
        )
        out = _linear(gated.view(-1, d_inner), w.out_proj_weight, w.out_proj_bias, dtype)
    return (
        out.view(batch, length, -1),
        x_dbl if keep else xz.new_empty(0),
        y if keep else xz.new_empty(0),
        xz if keep == 2 else xz.new_empty(0),
        u[0] if keep == 2 else xz.new_empty(0),
        u[1] if keep == 2 and len(u) == 2 else xz.new_empty(0),
    )


def _backward(
    grad: Tensor, hidden: Tensor, needs: list[bool], saved: list[Tensor], *arguments: Any
) -> list[Tensor]:
    """The gradients asked for by `needs` (of hidden, then of each tensor), in that order."""
    *tensors, scale, dtype, backend, _ = arguments
    w = _unpack(tuple(tensors))
    # a missing tensor needs no gradient, so pairs keep their shape through None
    flags = tuple(None if t is None else n for t, n in zip(tensors, needs[1:], strict=True))
    need = _unpack(flags)
    need_xz = needs[0] or need.in_proj_weight or bool(need.in_proj_bias)
    need_u = need_xz or any(need.conv_weight) or any(need.conv_bias or ())
    need_x_dbl = need_u or any(need.x_proj_weight)
    library = kernels(backend)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    batch, length, d_model = hidden.shape
    with torch.autocast(hidden.device.type, enabled=False):
        x_dbl, y, xz, *u_saved = saved
        rows = hidden.to(dtype).reshape(-1, d_model)
        if xz.numel() == 0 and hidden.numel() > 0:
            xz = _in_projection(hidden, w, dtype)
            u = _convolve(xz, w, backend)
        else:
            u = tuple(u_saved[: len(w.conv_weight)])
        d_inner = xz.shape[-1] // 2
        x, z = xz[..., :d_inner], xz[..., d_inner:]
        grad_rows = grad.to(dtype).reshape(-1, grad.shape[-1])

        d_out_weight = d_out_bias = None
        if need.out_proj_weight:
            gated = (y.to(sum_dtype) * F.silu(z.to(sum_dtype)) * scale).to(dtype)
            d_out_weight = torch.mm(grad_rows.T, gated.view(-1, d_inner))
        if need.out_proj_bias:
            d_out_bias = grad_rows.sum(0, dtype=sum_dtype)

        d_gated = torch.mm(grad_rows, cast(w.out_proj_weight, dtype)).view(batch, length, d_inner)
        activations, parameters = _scan_arguments(u, x_dbl, w)
        d_xz = torch.empty_like(xz) if need_xz else None
        num_scans = len(w.A_log)
        d_x_dbl = x_dbl.new_empty(num_scans, *x_dbl.shape[1:]) if need_x_dbl else None
        grads = library.scan_backward(
            d_gated,
            *activations,
            z,
            y,
            *parameters,
            reverse=w.scan_reverse,
            softplus=True,
            scale=scale,
            dz_out=None if d_xz is None else d_xz[..., d_inner:],
            dx_dbl_out=None if d_x_dbl is None else tuple(d_x_dbl),
            need=ScanNeeds(
                u=need_u,
                dt=need_x_dbl,
                B=need_x_dbl,
                C=need_x_dbl,
                z=need_xz,
                A=any(need.A_log),
                D=any(need.D),
                dt_weight=any(need.dt_weight),
                dt_bias=any(need.dt_bias),
            ),
        )

        # v1: two scans read one convolution, so their gradients add up
        d_u = _per_convolution(grads.du, w)
        d_low = None if d_x_dbl is None else _per_convolution(tuple(d_x_dbl), w)
        d_x_proj: list[Tensor | None] = [None] * len(u)
        for k, u_k in enumerate(u):
            if d_low is None:
                break
            low_rows = d_low[k].view(batch * length, -1)
            if need.x_proj_weight[k]:
                d_x_proj[k] = torch.mm(low_rows.T, u_k.view(-1, d_inner))
            if d_u is not None:
                d_u[k].view(-1, d_inner).addmm_(low_rows, cast(w.x_proj_weight[k], dtype))

        d_taps = d_conv_bias = None
        if d_u is not None:
            _, d_taps, d_conv_bias = library.conv_silu_backward(
                d_u,
                x,
                w.conv_weight,
                w.conv_bias,
                w.conv_reverse,
                dx_out=None if d_xz is None else d_xz[..., :d_inner],
                need_x=need_xz,
                need_weight=any(need.conv_weight),
                need_bias=any(need.conv_bias or ()),
            )
        d_hidden = d_in_weight = d_in_bias = None
        if d_xz is not None:
            xz_rows = d_xz.view(batch * length, -1)
            if needs[0]:
                d_hidden = torch.mm(xz_rows, cast(w.in_proj_weight, dtype)).view(hidden.shape)
            if need.in_proj_weight:
                d_in_weight = torch.mm(xz_rows.T, rows)
            if need.in_proj_bias:
                d_in_bias = xz_rows.sum(0, dtype=sum_dtype)

    everything = (
        d_hidden,
        *_pack(
            MixerWeights(
                in_proj_weight=d_in_weight,
                in_proj_bias=d_in_bias,
                conv_weight=d_taps or (None, None),
                conv_bias=d_conv_bias or (None, None),
                x_proj_weight=tuple(d_x_proj),
                dt_weight=_per_convolution(grads.ddt_weight, w) or (None, None),
                dt_bias=_per_convolution(grads.ddt_bias, w) or (None, None),
                A_log=grads.dA or (None, None),
                D=_per_convolution(grads.dD, w) or (None, None),
                out_proj_weight=d_out_weight,
                out_proj_bias=d_out_bias,
            )
        ),
    )
    originals = (hidden, *tensors)
    return [
        gradient.to(original.dtype)
        for gradient, original, wanted in zip(everything, originals, needs, strict=True)
        if wanted
    ]


def _per_convolution(
    per_scan: tuple[Tensor, ...] | None, w: MixerWeights
) -> tuple[Tensor, ...] | None:
    if per_scan is None or len(per_scan) == len(w.conv_weight):
        return per_scan
    return (per_scan[0] + per_scan[1],)


class _Mixer(torch.autograd.Function):
    """`_forward` with `_backward` as its derivative."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.scale, ctx.dtype, ctx.backend, ctx.keep = inputs
        ctx.num_inputs = len(tensors)
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (ctx.num_inputs + 4)
        tensors = ctx.saved_tensors
        (hidden, *weights), saved = tensors[: ctx.num_inputs], list(tensors[ctx.num_inputs :])
        needs = list(ctx.needs_input_grad[: ctx.num_inputs])
        settings = (ctx.scale, ctx.dtype, ctx.backend, ctx.keep)
        run = _mixer_backward_op if torch.compiler.is_compiling() else _backward
        found = iter(run(grad, hidden, needs, saved, *weights, *settings))
        return (*(next(found) if wanted else None for wanted in needs), *(None,) * 4)


# what follows names the functions above for the compiler; the schema is written out because it is
# the one place where the order of the tensors is fixed
_TENSORS = (
    "Tensor hidden, Tensor in_proj_weight, Tensor? in_proj_bias, "
    "Tensor conv_weight, Tensor? conv_weight_b, Tensor? conv_bias, Tensor? conv_bias_b, "
    "Tensor x_proj_weight, Tensor? x_proj_weight_b, Tensor dt_weight, Tensor? dt_weight_b, "
    "Tensor dt_bias, Tensor? dt_bias_b, Tensor A_log, Tensor? A_log_b, Tensor D, Tensor? D_b, "
    "Tensor out_proj_weight, Tensor? out_proj_bias, "
    "float scale, ScalarType dtype, str backend, int keep"
)
_AFTER_GRAD = _TENSORS.replace(", ", ", bool[] needs, Tensor[] saved, ", 1)
_mixer_op = torch.library.custom_op(
    "svp_peft::mixer",
    _forward,
    mutates_args=(),
    schema=f"({_TENSORS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_mixer_backward_op = torch.library.custom_op(
    "svp_peft::mixer_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad, {_AFTER_GRAD}) -> Tensor[]",
)


@_mixer_op.register_fake
def _(hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, _, dtype, _, keep = arguments
    w = _unpack(tuple(tensors))
    batch, length, _ = hidden.shape
    d_inner = w.out_proj_weight.shape[1]

    def empty(*shape: int, wanted: bool = True) -> Tensor:
        return hidden.new_empty(shape if wanted else (0,), dtype=dtype)

    rows = (batch, length)
    return (
        empty(*rows, w.out_proj_weight.shape[0]),
        empty(len(w.conv_weight), *rows, w.x_proj_weight[0].shape[0], wanted=keep > 0),
        empty(*rows, d_inner, wanted=keep > 0),
        empty(*rows, 2 * d_inner, wanted=keep == 2),
        empty(*rows, d_inner, wanted=keep == 2),
        empty(*rows, d_inner, wanted=keep == 2 and len(w.conv_weight) == 2),
    )


@_mixer_backward_op.register_fake
def _(
    grad: Tensor, hidden: Tensor, needs: list[bool], saved: list[Tensor], *arguments: Any
) -> list[Tensor]:
    originals = (hidden, *arguments[:-4])
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, wanted in zip(originals, needs, strict=True)
        if wanted
    ]


_mixer_op.register_autograd(_Mixer.backward, setup_context=_Mixer.setup_context)
