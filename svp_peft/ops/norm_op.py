"""Residual add and normalisation in one op."""

from typing import Any

import torch
from torch import Tensor, library

from svp_peft.ops import reference
from svp_peft.ops.backends import choose, kernels, provides
from svp_peft.ops.derivatives import refuse_second
from svp_peft.ops.shapes import expect


def add_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    rms: bool = True,
    residual_dtype: torch.dtype | None = None,
    drop_mask: Tensor | None = None,
    drop_scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the block's input to the residual stream and normalise the sum.

    The formula is in `svp_peft.ops.reference.add_norm`.

    Args:
        hidden: float (batch, L, d_model), what the previous mixer returned, prompt included.
        residual: (batch, L, d_model), or None in the first block.
        weight, bias: (d_model,); bias may be None.
        eps: added to the mean square (rms) or the variance (LayerNorm).
        rms: RMSNorm if true, else LayerNorm.
        residual_dtype: dtype of the returned residual; None keeps the residual's, or hidden's.
        drop_mask, drop_scale: stochastic depth: hidden is first multiplied by
            drop_mask * drop_scale, image by image. drop_mask is float32 (batch,).
        backend: see `svp_peft.set_backend`; None takes the process default.

    Returns:
        The normalised sum in hidden's dtype and the sum itself in `residual_dtype`.

    Raises:
        InputError: shapes that do not fit together.
        BackendError: a backend was named that cannot run on these tensors.
    """
    width = hidden.shape[-1:]
    if (
        weight.shape != width
        or (bias is not None and bias.shape != width)
        or (residual is not None and residual.shape != hidden.shape)
    ):
        given = f"hidden {tuple(hidden.shape)}"
        expect(given, weight=(weight, width), bias=(bias, width), residual=(residual, hidden.shape))
    if residual_dtype is None:
        residual_dtype = hidden.dtype if residual is None else residual.dtype
    # the C++ kernels are float32: halves on a CPU take plain PyTorch, as in `mixer`
    half_on_cpu = hidden.device.type == "cpu" and hidden.dtype.itemsize == 2
    name = choose(backend, hidden.device, torch.float32 if half_on_cpu else hidden.dtype)
    if drop_mask is not None and (name != "cuda" or torch.compiler.is_compiling()):
        keep = (drop_mask * drop_scale).to(hidden.dtype)
        hidden, drop_mask = hidden * keep.view(-1, *[1] * (hidden.dim() - 1)), None
    if half_on_cpu or not provides(name, "add_norm_backward"):
        with torch.autocast(hidden.device.type, enabled=False):
            return reference.add_norm(
                hidden, residual, weight, bias, eps=eps, rms=rms, residual_dtype=residual_dtype
            )
    arguments = (hidden, residual, weight, bias, eps, rms, residual_dtype, name)
    if torch.compiler.is_compiling():
        return _add_norm_op(*arguments)  # type: ignore[no-any-return]
    return _AddNorm.apply(*arguments, drop_mask, drop_scale)  # type: ignore[no-any-return]


def _forward(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    residual_dtype: torch.dtype,
    backend: str,
    **mask: Any,
) -> tuple[Tensor, Tensor]:
    return kernels(backend).add_norm(  # type: ignore[no-any-return]
        hidden, residual, weight, bias, eps=eps, rms=rms, residual_dtype=residual_dtype, **mask
    )


def _backward(
    grad: Tensor | None,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    needs: list[bool],
    eps: float,
    rms: bool,
    hidden_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    backend: str,
    **mask: Any,
) -> list[Tensor]:
    """Gradients of (hidden, residual, weight, bias), those that `needs` asks for."""
    if grad is None:
        grad = torch.zeros_like(total, dtype=hidden_dtype)
    found = kernels(backend).add_norm_backward(
        grad.contiguous(),
        None if grad_total is None else grad_total.contiguous(),
        total,
        weight,
        eps=eps,
        rms=rms,
        need_weight=needs[2],
        need_bias=needs[3],
        hidden_dtype=hidden_dtype,
        residual_in_dtype=residual_dtype if needs[1] else None,
        **mask,
    )
    return [g for g, wanted in zip(found, needs, strict=True) if wanted and g is not None]


def _backward_apart(*arguments: Any) -> list[Tensor]:
    """`_backward` with no tensor twice: an op may not return one storage in two places."""
    gradients = _backward(*arguments)
    if len(gradients) > 1 and gradients[0] is gradients[1]:
        gradients[1] = gradients[1].clone()
    return gradients


def _forward_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _forward(*arguments)


class _AddNorm(torch.autograd.Function):
    """Eager mode. `forward` takes ctx: with a setup_context, torch binds the arguments to the
    signature at every call, which costs more than the launch of the kernel."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, mask, mask_scale = arguments
        ctx.mask = {} if mask is None else {"mask": mask, "mask_scale": mask_scale}
        output = _forward(*inputs, **ctx.mask)
        _remember(ctx, tuple(inputs), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        refuse_second()
        return (*_gradients(ctx, _backward, *grads, **ctx.mask), None, None)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, residual, weight, bias, ctx.eps, ctx.rms, _, ctx.backend = inputs
    ctx.dtypes = (hidden.dtype, None if residual is None else residual.dtype)
    ctx.parameter_dtypes = (weight.dtype, None if bias is None else bias.dtype)
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, run: Any, grad: Tensor | None, grad_total: Tensor | None, **mask: Any
) -> tuple[Any, ...]:
    if grad is None and grad_total is None:
        return (None,) * 8
    total, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    settings = (ctx.eps, ctx.rms, *ctx.dtypes, ctx.backend)
    found = iter(run(grad, grad_total, total, weight, needs, *settings, **mask))
    dtypes = (*ctx.dtypes, *ctx.parameter_dtypes)
    gradients = [
        next(found).to(dtype) if wanted else None
        for wanted, dtype in zip(needs, dtypes, strict=True)
    ]
    return (*gradients, None, None, None, None)


_add_norm_op = library.custom_op(
    "svp_peft::add_norm",
    _forward_op,
    mutates_args=(),
    schema="(Tensor hidden, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool rms, "
    "ScalarType residual_dtype, str backend) -> (Tensor, Tensor)",
)
_backward_op = library.custom_op(
    "svp_peft::add_norm_backward",
    _backward_apart,
    mutates_args=(),
    schema="(Tensor? grad, Tensor? grad_total, Tensor total, Tensor weight, bool[] needs, "
    "float eps, bool rms, ScalarType hidden_dtype, ScalarType? residual_dtype, str backend) "
    "-> Tensor[]",
)


@_add_norm_op.register_fake
def _(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape, dtype=arguments[5])


@_backward_op.register_fake
def _(
    grad: Tensor | None,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    needs: list[bool],
    eps: float,
    rms: bool,
    hidden_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    backend: str,
) -> list[Tensor]:
    shapes = (total.shape, total.shape, weight.shape, weight.shape)
    dtypes = (hidden_dtype, residual_dtype or hidden_dtype, torch.float32, torch.float32)
    return [
        total.new_empty(shape, dtype=dtype)
        for shape, dtype, wanted in zip(shapes, dtypes, needs, strict=True)
        if wanted
    ]


def _op_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    return _gradients(ctx, _backward_op, *grads)


_add_norm_op.register_autograd(_op_backward, setup_context=_remember)
