"""Residual add with RMSNorm or LayerNorm: one token per program.

Shapes in this file

    rows     batch * L, the tokens of all images one after the other
    BD       d_model rounded up to a power of two
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from svp_peft.ops.triton.launch import on_device, power_of_two

# programs that share the rows where parameter gradients are wanted: fixed, so that the sums are
# the same on every GPU
_PARTS = 256


@triton.jit
def _moments(total, mask, eps, d_model: tl.constexpr, RMS: tl.constexpr):
    """The centred token and one over its deviation."""
    if RMS:
        centred = total
    else:
        centred = tl.where(mask, total - tl.sum(total, 0) / d_model, 0.0)
    variance = tl.sum(centred * centred, 0) / d_model
    return centred, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def _forward_kernel(
    hidden, residual, y, total,  # [rows, d_model]
    weight, bias,  # [d_model]
    eps,
    d_model: tl.constexpr, RMS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BD)
    mask = col < d_model
    # int64: a token's offset overflows int32 above 5.5 million tokens of width 384
    at = tl.program_id(0).to(tl.int64) * d_model + col
    b_total = tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(total + at, b_total.to(total.dtype.element_ty), mask=mask)
    centred, scale = _moments(b_total, mask, eps, d_model, RMS)
    b_y = centred * scale * tl.load(weight + col, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_y += tl.load(bias + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, b_y.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad, grad_total, total,  # [rows, d_model]
    weight,  # [d_model]
    d_hidden, d_residual,  # [rows, d_model]
    shares,  # [programs, 2, d_model] float32: of the weight, then of the bias
    rows, eps,
    d_model: tl.constexpr, RMS: tl.constexpr, HAS_GRAD_TOTAL: tl.constexpr,
    NEED_RESIDUAL: tl.constexpr, NEED_PARAMETERS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BD)
    mask = col < d_model
    b_weight = tl.load(weight + col, mask=mask, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BD,), tl.float32)
    d_bias = tl.zeros((BD,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.full((1,), row, tl.int64) * d_model + col
        b_total = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
        b_grad = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        centred, scale = _moments(b_total, mask, eps, d_model, RMS)
        unit = centred * scale
        d_unit = b_grad * b_weight
        d_total = d_unit - unit * (tl.sum(d_unit * unit, 0) / d_model)
        if not RMS:
            d_total -= tl.sum(d_unit, 0) / d_model
        d_total *= scale
        if HAS_GRAD_TOTAL:
            d_total += tl.load(grad_total + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_hidden + at, d_total.to(d_hidden.dtype.element_ty), mask=mask)
        if NEED_RESIDUAL:
            tl.store(d_residual + at, d_total.to(d_residual.dtype.element_ty), mask=mask)
        if NEED_PARAMETERS:
            d_weight += b_grad * unit
            d_bias += b_grad
    if NEED_PARAMETERS:
        share = shares + tl.program_id(0) * 2 * d_model + col
        tl.store(share, d_weight, mask=mask)
        tl.store(share + d_model, d_bias, mask=mask)


def add_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    rms: bool,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`svp_peft.ops.reference.add_norm`. Not differentiable."""
    hidden = hidden.contiguous()
    d_model = hidden.shape[-1]
    y = torch.empty_like(hidden)
    total = torch.empty_like(hidden, dtype=residual_dtype)
    if hidden.numel() == 0:
        return y, total
    with on_device(hidden):
        _forward_kernel[(hidden.numel() // d_model,)](
            hidden, hidden if residual is None else residual.contiguous(), y, total,
            weight.contiguous(), weight if bias is None else bias.contiguous(), eps,
            d_model=d_model, RMS=rms, HAS_RESIDUAL=residual is not None,
            HAS_BIAS=bias is not None, **_block(d_model),
        )  # fmt: skip
    return y, total


def add_norm_backward(
    grad_y: Tensor,
    grad_residual_out: Tensor | None,
    residual_out: Tensor,
    weight: Tensor,
    *,
    eps: float,
    rms: bool,
    need_weight: bool,
    need_bias: bool,
    hidden_dtype: torch.dtype,
    residual_in_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `add_norm`: (dhidden, dresidual, dweight, dbias), those not wanted None.

    dresidual is the same tensor as dhidden where the dtypes agree. `residual_in_dtype` is None
    where there was no residual or its gradient is not wanted. dweight and dbias are float32.
    """
    grad_y, residual_out = grad_y.contiguous(), residual_out.contiguous()
    d_model = residual_out.shape[-1]
    rows = residual_out.numel() // max(1, d_model)
    d_hidden = torch.empty_like(residual_out, dtype=hidden_dtype)
    d_residual = None
    if residual_in_dtype is not None:
        same = residual_in_dtype == hidden_dtype
        d_residual = d_hidden if same else torch.empty_like(residual_out, dtype=residual_in_dtype)
    need_parameters = need_weight or need_bias
    programs = min(rows, _PARTS) if need_parameters else rows
    shares = residual_out.new_empty(
        (programs if need_parameters else 1, 2, d_model), dtype=torch.float32
    )
    if rows:
        with on_device(residual_out):
            _backward_kernel[(programs,)](
                grad_y, grad_y if grad_residual_out is None else grad_residual_out.contiguous(),
                residual_out, weight.contiguous(),
                d_hidden, d_hidden if d_residual is None else d_residual, shares, rows, eps,
                d_model=d_model, RMS=rms, HAS_GRAD_TOTAL=grad_residual_out is not None,
                NEED_RESIDUAL=d_residual is not None and d_residual is not d_hidden,
                NEED_PARAMETERS=need_parameters, **_block(d_model),
            )  # fmt: skip
    d_weight, d_bias = shares.sum(0) if need_parameters else (None, None)
    return d_hidden, d_residual, d_weight if need_weight else None, d_bias if need_bias else None


def _block(d_model: int) -> dict[str, int]:
    BD = power_of_two(d_model)
    return {"BD": BD, "num_warps": max(1, min(8, BD // 512))}
