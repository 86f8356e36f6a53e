"""The two SVP prompts on tokens: activations, scales, class tokens and the sum in one kernel.

Shapes in this file

    rows     batch * L, the tokens of all images one after the other
    BR, BD   tokens and channels of one tile
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from svp_peft.ops.triton.launch import on_device

_TOKENS, _CHANNELS = 16, 128

# tiles of tokens per program where the scales' gradients are summed
_TILES = 8

# class tokens that the kernels know; further ones are put right afterwards
_SKIPPED = 4


@triton.jit
def _is_skipped(row, L, skip0, skip1, skip2, skip3):
    """Whether the token is a class token; unused positions are -1."""
    t = row % L
    return (t == skip0) | (t == skip1) | (t == skip2) | (t == skip3)


@triton.jit(do_not_specialize=["rows", "L", "skip0", "skip1", "skip2", "skip3"])
def _forward_kernel(
    x, cross, inner, out,  # [rows, d_model]
    alpha, beta,  # [d_model]
    rows, L, skip0, skip1, skip2, skip3,
    d_model: tl.constexpr, HAS_CROSS: tl.constexpr, HAS_INNER: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # int64: a token's offset overflows int32 above 5.5 million tokens of width 384
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    col = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (row < rows)[:, None] & (col < d_model)[None, :]
    at = row[:, None] * d_model + col[None, :]
    added = tl.zeros((BR, BD), tl.float32)
    if HAS_CROSS:
        b_cross = tl.load(cross + at, mask=mask, other=0.0).to(tl.float32)
        b_alpha = tl.load(alpha + col, mask=col < d_model, other=0.0).to(tl.float32)
        added += b_alpha[None, :] * b_cross * tl.sigmoid(b_cross)
    if HAS_INNER:
        b_inner = tl.load(inner + at, mask=mask, other=0.0).to(tl.float32)
        b_beta = tl.load(beta + col, mask=col < d_model, other=0.0).to(tl.float32)
        added += b_beta[None, :] * b_inner * tl.sigmoid(b_inner)
    skipped = _is_skipped(row, L, skip0, skip1, skip2, skip3)
    added = tl.where(skipped[:, None], 0.0, added)
    b_x = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (b_x + added).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _silu_backward(grad, pointer, d_pointer, scale, at, mask):
    """Store the gradient before the activation; return the scale's, [BR, BD]."""
    value = tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.sigmoid(value)
    d_value = grad * scale[None, :] * gate * (1.0 + value * (1.0 - gate))
    tl.store(d_pointer + at, d_value.to(d_pointer.dtype.element_ty), mask=mask)
    return grad * value * gate


@triton.jit(do_not_specialize=["rows", "L", "skip0", "skip1", "skip2", "skip3"])
def _backward_kernel(
    grad, cross, inner, d_cross, d_inner,  # [rows, d_model]
    alpha, beta,  # [d_model]
    shares,  # [programs, 2, d_model] float32: of alpha, then of beta
    rows, L, skip0, skip1, skip2, skip3,
    d_model: tl.constexpr, HAS_CROSS: tl.constexpr, HAS_INNER: tl.constexpr,
    TILES: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = col < d_model
    d_alpha = tl.zeros((BR, BD), tl.float32)
    d_beta = tl.zeros((BR, BD), tl.float32)
    for tile in range(TILES):
        row = tl.program_id(0).to(tl.int64) * (TILES * BR) + tile * BR + tl.arange(0, BR)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * d_model + col[None, :]
        b_grad = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        skipped = _is_skipped(row, L, skip0, skip1, skip2, skip3)
        b_grad = tl.where(skipped[:, None], 0.0, b_grad)
        if HAS_CROSS:
            b_alpha = tl.load(alpha + col, mask=inside, other=0.0).to(tl.float32)
            d_alpha += _silu_backward(b_grad, cross, d_cross, b_alpha, at, mask)
        if HAS_INNER:
            b_beta = tl.load(beta + col, mask=inside, other=0.0).to(tl.float32)
            d_beta += _silu_backward(b_grad, inner, d_inner, b_beta, at, mask)
    share = shares + tl.program_id(0).to(tl.int64) * 2 * d_model + col
    tl.store(share, tl.sum(d_alpha, 0), mask=inside)
    tl.store(share + d_model, tl.sum(d_beta, 0), mask=inside)


def prompt(
    x: Tensor,
    cross: Tensor | None,
    inner: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    skip: Sequence[int],
) -> Tensor:
    """`svp_peft.ops.reference.prompt` without dropout. Not differentiable."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    rows, d_model = x.shape[0] * x.shape[1], x.shape[2]
    with on_device(x):
        _forward_kernel[triton.cdiv(rows, _TOKENS), triton.cdiv(d_model, _CHANNELS)](
            x, _or(cross, x), _or(inner, x), out, _or(alpha, x), _or(beta, x),
            rows, x.shape[1], *_positions(skip),
            d_model=d_model, HAS_CROSS=cross is not None, HAS_INNER=inner is not None,
            BR=_TOKENS, BD=_CHANNELS, num_warps=4,
        )  # fmt: skip
    for position in skip[_SKIPPED:]:
        out[:, position] = x[:, position]
    return out


def prompt_backward(
    grad: Tensor,
    cross: Tensor | None,
    inner: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    skip: Sequence[int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `prompt`: (dcross, dinner, dalpha, dbeta); that of x is `grad` itself.

    dcross and dinner are zero at the class tokens; dalpha and dbeta are float32. The same inputs
    give the same bits.
    """
    grad = grad.contiguous()
    if len(skip) > _SKIPPED:
        grad = grad.clone()
        for position in skip[_SKIPPED:]:
            grad[:, position] = 0.0
    d_cross = None if cross is None else torch.empty_like(grad, dtype=cross.dtype)
    d_inner = None if inner is None else torch.empty_like(grad, dtype=inner.dtype)
    rows, d_model = grad.shape[0] * grad.shape[1], grad.shape[2]
    programs = triton.cdiv(rows, _TOKENS * _TILES)
    shares = grad.new_empty(programs, 2, d_model, dtype=torch.float32)
    if grad.numel():
        with on_device(grad):
            _backward_kernel[programs, triton.cdiv(d_model, _CHANNELS)](
                grad, _or(cross, grad), _or(inner, grad), _or(d_cross, grad), _or(d_inner, grad),
                _or(alpha, grad), _or(beta, grad), shares, rows, grad.shape[1], *_positions(skip),
                d_model=d_model, HAS_CROSS=cross is not None, HAS_INNER=inner is not None,
                TILES=_TILES, BR=_TOKENS, BD=_CHANNELS, num_warps=4,
            )  # fmt: skip
    d_alpha, d_beta = shares.sum(0).unbind()
    return d_cross, d_inner, None if cross is None else d_alpha, None if inner is None else d_beta


def _or(x: Tensor | None, missing: Tensor) -> Tensor:
    return missing if x is None else x.contiguous()


def _positions(skip: Sequence[int]) -> tuple[int, ...]:
    return (*skip[:_SKIPPED], *(-1,) * (_SKIPPED - len(skip[:_SKIPPED])))
