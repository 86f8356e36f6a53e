"""The SVP prompts as one op on tokens: projections, activations, scales, class tokens, sum."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp_peft.errors import InputError
from svp_peft.ops import reference
from svp_peft.ops.backends import choose, kernels, provides
from svp_peft.ops.casting import cast, compute_dtype
from svp_peft.ops.derivatives import refuse_second
from svp_peft.ops.shapes import expect
from svp_peft.ops.types import Cache

# up to this many elements of x the pre-activations are kept for the backward pass; beyond it they
# are computed again, which costs three small products and saves two tensors of x's size per block
KEEP_PRE_ACTIVATIONS = 1_500_000


def svp_prompt(
    x: Tensor,
    cross_weight: Tensor | None,
    cross_bias: Tensor | None,
    down_weight: Tensor | None,
    down_bias: Tensor | None,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    *,
    skip: Sequence[int] = (),
    dropout: float = 0.0,
    training: bool = False,
    cache: Cache | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add the cross and the inner prompt to every token except those in `skip`.

        x'_t = x_t + alpha * SiLU(W x_t + b) + beta * SiLU(U (D x_t + c) + d)

    Args:
        x: tokens entering a block, float (batch, L, d_model). Not modified.
        cross_weight, cross_bias: W (d_model, d_model), b (d_model,); None: no cross prompt.
        down_weight, down_bias: D (inner_bottleneck, d_model), c; None: no inner prompt.
        up_weight, up_bias: U (d_model, inner_bottleneck), d.
        alpha, beta: learned scales of the cross and the inner prompt, (d_model,).
        skip: positions of the class tokens, sorted, each in 0..L-1.
        dropout: probability of dropping an element of either prompt where `training`.
        cache: kept by a module for its weights, so that a backend may prepare them.
        backend: see `svp_peft.set_backend`; None takes the process default.

    Returns:
        (batch, L, d_model) in x's dtype; x bit for bit where alpha = beta = 0. Under autocast the
        products are in the autocast dtype, else in the wider of x's dtype and the weights'.

    Raises:
        InputError: shapes that do not fit together, or a position beyond the last token.
        BackendError: a backend was named that cannot run on these tensors.

    Source: SVP (arXiv 2412.08947), equations of the cross and the inner prompter.
    """
    tensors = (cross_weight, cross_bias, down_weight, down_bias, up_weight, up_bias, alpha, beta)
    _check(x, alpha, beta, skip)
    # the kernels see x and the products: both must be of a dtype that the backend knows
    product = x.dtype if cross_weight is None else product_dtype(x, cross_weight)
    halves = [dtype for dtype in (x.dtype, product) if dtype.itemsize < 4]
    # the C++ kernels are float32: halves on a CPU take plain PyTorch, as in `mixer`
    half_on_cpu = bool(halves) and x.device.type == "cpu"
    kernel_dtype = torch.float32 if half_on_cpu else halves[0] if halves else product
    name = choose(backend, x.device, kernel_dtype)
    dropping = training and dropout > 0
    fused = provides(name, "prompt_backward") and not half_on_cpu
    # what a compiler traces and torch.func transforms are plain PyTorch
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    fused = fused and not traced
    if fused and not dropping and cross_weight is not None and down_weight is not None:
        if name == "cuda" and x.numel() and all(is_plain(t, x.device) for t in tensors):
            keep = x.numel() <= KEEP_PRE_ACTIVATIONS
            return kernels(name).joint_prompt(x, tensors, tuple(skip), product, keep, cache)  # type: ignore[no-any-return]
        return _Prompt.apply(x, *tensors, tuple(skip), product, name)  # type: ignore[no-any-return]
    drop = _dropout(dropout) if dropping else None
    tokens = x if torch.is_autocast_enabled(x.device.type) else x.to(_parameter_dtype(x, tensors))
    cross = None if cross_weight is None else F.linear(tokens, cross_weight, cross_bias)
    inner = None
    if down_weight is not None and up_weight is not None:
        inner = F.linear(F.linear(tokens, down_weight, down_bias), up_weight, up_bias)
    return reference.prompt(x, cross, inner, alpha, beta, skip, drop=drop)


def _check(x: Tensor, alpha: Tensor | None, beta: Tensor | None, skip: Sequence[int]) -> None:
    """What no matrix product checks."""
    if x.dim() != 3 or (skip and not 0 <= skip[0] <= skip[-1] < x.shape[1]):
        raise InputError(
            f"x has shape {tuple(x.shape)} and skip is {tuple(skip)}: the prompt takes x (batch, "
            f"L, d_model) and sorted positions in 0..L-1."
        )
    width = x.shape[2:]
    if (alpha is not None and alpha.shape != width) or (beta is not None and beta.shape != width):
        expect(f"x {tuple(x.shape)}", alpha=(alpha, width), beta=(beta, width))


def is_plain(weight: Tensor | None, device: torch.device) -> bool:
    """Whether a kernel on `device` can read this trained tensor as it is."""
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.dtype == torch.float32  # type: ignore[union-attr]
        and weight.device == device  # type: ignore[union-attr]
        and weight.is_contiguous()  # type: ignore[union-attr]
    )


def svp_prompt_released(
    x: Tensor,
    cross_weight: Tensor,
    cross_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    alpha: Tensor,
    beta: Tensor,
    *,
    position: int,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """The prompts of the released SVP code; formula in `svp_peft.ops.reference.prompt_released`.

    Arguments and result as in `svp_prompt`; `position` is the index of the class token, which
    must have as many tokens before it as after it.
    """
    drop = _dropout(dropout) if training and dropout > 0 else None
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = x.dtype if autocast else torch.promote_types(x.dtype, cross_weight.dtype)

    def inner_of(tokens: Tensor) -> Tensor:
        return F.linear(F.linear(tokens.to(dtype), down_weight, down_bias), up_weight, up_bias)

    def cross_of(tokens: Tensor) -> Tensor:
        return F.linear(tokens.to(dtype), cross_weight, cross_bias)

    return reference.prompt_released(x, cross_of, inner_of, alpha, beta, position, drop=drop)


def _dropout(probability: float) -> Callable[[Tensor], Tensor]:
    def drop(activated: Tensor) -> Tensor:
        return F.dropout(activated, probability, training=True)

    return drop


def _parameter_dtype(x: Tensor, tensors: Sequence[Tensor | None]) -> torch.dtype:
    dtypes = {t.dtype for t in tensors if t is not None} | {x.dtype}
    widest = x.dtype
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return compute_dtype(x)
    return torch.promote_types(x.dtype, weight.dtype)


def _pre_activations(
    rows: Tensor,
    weights: Sequence[Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(cross, middle, inner) of `rows` (tokens, d_model): what enters the two activations."""
    cross_weight, cross_bias, down_weight, down_bias, up_weight, up_bias = weights
    cross = torch.addmm(cast(cross_bias, dtype), rows, cast(cross_weight, dtype).T)
    middle = torch.addmm(cast(down_bias, dtype), rows, cast(down_weight, dtype).T)
    inner = torch.addmm(cast(up_bias, dtype), middle, cast(up_weight, dtype).T)
    return cross, middle, inner


class _Prompt(torch.autograd.Function):
    """The prompt on a fast backend: products by PyTorch, the rest in one kernel each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        *tensors, skip, dtype, backend = arguments
        *weights, alpha, beta = tensors
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(dtype).reshape(-1, x.shape[-1])
            cross, middle, inner = _pre_activations(rows, weights, dtype)
            contiguous = x.contiguous()
            out = kernels(backend).prompt(
                contiguous, cross.view(x.shape), inner.view(x.shape), alpha, beta, skip
            )
        # memory is plentiful beside a CPU, products are not
        kept = x.device.type == "cpu" or x.numel() <= KEEP_PRE_ACTIVATIONS
        keep = (cross, middle, inner) if kept else ()
        ctx.save_for_backward(contiguous, *tensors, *keep)
        ctx.settings = (skip, dtype, backend)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second()
        x, *tensors = ctx.saved_tensors
        *weights, alpha, beta = tensors[:8]
        skip, dtype, backend = ctx.settings
        need_x, *need = ctx.needs_input_grad[:9]
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(dtype).reshape(-1, x.shape[-1])
            cross, middle, inner = tensors[8:] or _pre_activations(rows, weights, dtype)
            grad = grad.contiguous()
            d_cross, d_inner, d_alpha, d_beta = kernels(backend).prompt_backward(
                grad, cross.view(x.shape), inner.view(x.shape), alpha, beta, skip
            )
            # kernels answer in grad's dtype, which need not be that of the products
            d_cross = d_cross.view(rows.shape).to(dtype)
            d_inner = d_inner.view(rows.shape).to(dtype)
            cross_weight, _, down_weight, _, up_weight, _ = weights
            sum_dtype = torch.promote_types(dtype, torch.float32)
            d_middle = torch.mm(d_inner, cast(up_weight, dtype))
            d_x = None
            if need_x:
                d_rows = torch.mm(d_cross, cast(cross_weight, dtype))
                d_rows.addmm_(d_middle, cast(down_weight, dtype))
                d_x = (grad + d_rows.view(x.shape)).to(x.dtype)
            found = (
                torch.mm(d_cross.T, rows) if need[0] else None,
                d_cross.sum(0, dtype=sum_dtype) if need[1] else None,
                torch.mm(d_middle.T, rows) if need[2] else None,
                d_middle.sum(0, dtype=sum_dtype) if need[3] else None,
                torch.mm(d_inner.T, middle) if need[4] else None,
                d_inner.sum(0, dtype=sum_dtype) if need[5] else None,
                d_alpha if need[6] else None,
                d_beta if need[7] else None,
            )
        gradients = [
            None if g is None else g.to(t.dtype) for g, t in zip(found, tensors[:8], strict=True)
        ]
        return (d_x, *gradients, None, None, None)
