"""The Vim mixer as one op: what it saves, what it recomputes, which gradients it makes.

The kernels come from a backend (`svp_peft.ops.cpu`, `.cuda`, `.triton`); the projections are
matrix products by PyTorch. The passes are in `mixer_passes.py`.

The backward pass makes exactly the gradients asked for: with a frozen backbone that is the one of
the input, and no product that makes a weight's gradient is ever formed.

Eager mode runs an `autograd.Function`; under `torch.compile` and `torch.export` the same functions
are the op `svp_peft::mixer`, which the compiler sees as one node. A frozen mixer in half precision
on a GPU is prepared once instead (`svp_peft.ops.cuda.frozen_mixer`), and a model may run many of
them, with what lies between, by `svp_peft.ops.frozen_stack`.
"""

from typing import Any

import torch
from torch import Tensor, library

from svp_peft.ops.backends import choose, kernels
from svp_peft.ops.casting import compute_dtype
from svp_peft.ops.derivatives import refuse_second
from svp_peft.ops.mixer_passes import backward_pass, forward_pass, pack, unpack
from svp_peft.ops.types import Cache, MixerWeights

# up to this many elements of xz per block everything is kept. On a GPU: at Vim-Small's width 20
# images of 224 x 224, 0.6 GiB over 24 blocks in bfloat16; larger batches trade time for memory. A
# CPU has the memory, and a product costs it far more
_KEEP_EVERYTHING = {"cuda": 6_000_000, "cpu": 1 << 62}
# elements of xz up to which a CPU takes all images at once; a larger batch goes in parts. glibc
# fetches every tensor of 32 MiB and more fresh from the system, zeroed page by page, which made 64
# images of Vim-Small a fifth slower than four times 16
_AT_ONCE_ON_CPU = 5_000_000


def mixer(
    hidden: Tensor,
    weights: MixerWeights,
    *,
    scale: float = 1.0,
    cache: Cache | None = None,
    backend: str | None = None,
) -> Tensor:
    """The mixer of one Vim block: in_proj, convolutions, scans in both directions, gate, out_proj.

    The formula is in `svp_peft.ops.reference.mixer`. Under autocast the matrix products and the
    result are in the autocast dtype; states and sums are in float32.

    Args:
        hidden: float (batch, L, d_model), normalised tokens. Any L from 1 on.
        weights: the mixer's tensors; see `MixerWeights`.
        scale: 0.5 where the sum of two directions is divided by two.
        cache: kept by a module whose frozen `weights` are the same object at every call, so that
            a backend may prepare them once; None for weights that are trained.
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
    if cache is not None and name == "cuda" and not torch.compiler.is_compiling():
        prepared = prepared_mixer(cache, weights, working, scale)
        if prepared is not None and hidden.numel():
            keep = 0
            if hidden.requires_grad and torch.is_grad_enabled():
                keep = keep_level(hidden, weights)
            return prepared(hidden, keep)  # type: ignore[no-any-return]
    tensors = pack(weights)
    keep = 0
    if torch.is_grad_enabled() and (
        hidden.requires_grad or any(t is not None and t.requires_grad for t in tensors)
    ):
        keep = keep_level(hidden, weights)
    settings = (*tensors, scale, working, name, keep)
    if torch.compiler.is_compiling():
        return _mixer_op(hidden, *settings)[0].to(dtype)  # type: ignore[no-any-return]
    parts = hidden.split(_images_at_once(hidden, weights)) if name == "cpu" else (hidden,)
    outputs = [_Mixer.apply(part, *settings)[0].to(dtype) for part in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _images_at_once(hidden: Tensor, weights: MixerWeights) -> int:
    """Into how large parts a batch is split on a CPU."""
    per_image = hidden.shape[1] * weights.in_proj_weight.shape[0]
    return max(1, _AT_ONCE_ON_CPU // max(1, per_image))


def keep_level(hidden: Tensor, weights: MixerWeights) -> int:
    """How much to keep for the backward pass; see `mixer_passes.py`."""
    elements = hidden.shape[0] * hidden.shape[1] * weights.in_proj_weight.shape[0]
    return 2 if elements <= _KEEP_EVERYTHING.get(hidden.device.type, 0) else 1


def prepared_mixer(cache: Cache, weights: MixerWeights, dtype: torch.dtype, scale: float) -> Any:
    """What the CUDA backend made of frozen weights, made anew when they changed; or None."""
    if cache.prepared is None or not cache.prepared.is_for(dtype, scale):
        cache.prepared = kernels("cuda").frozen_mixer(weights, dtype, scale)
    return cache.prepared


class _Mixer(torch.autograd.Function):
    """Eager mode. `forward` takes ctx: with a setup_context, torch binds the arguments to the
    signature at every call, which costs more than several launches."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        output = forward_pass(*arguments)
        _remember(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_second()
        return _gradients(ctx, backward_pass, grad)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """`forward_pass` with `backward_pass` as its derivative: what the latter needs."""
    *tensors, ctx.scale, ctx.dtype, ctx.backend, ctx.keep = inputs
    ctx.num_inputs = len(tensors)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, run: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * (ctx.num_inputs + 4)
    tensors = ctx.saved_tensors
    (hidden, *weights), saved = tensors[: ctx.num_inputs], list(tensors[ctx.num_inputs :])
    needs = list(ctx.needs_input_grad[: ctx.num_inputs])
    settings = (ctx.scale, ctx.dtype, ctx.backend, ctx.keep)
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
_mixer_op = library.custom_op(
    "svp_peft::mixer",
    forward_pass,
    mutates_args=(),
    schema=f"({_TENSORS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_mixer_backward_op = library.custom_op(
    "svp_peft::mixer_backward",
    backward_pass,
    mutates_args=(),
    schema=f"(Tensor grad, {_AFTER_GRAD}) -> Tensor[]",
)


@_mixer_op.register_fake
def _(hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, _, dtype, _, keep = arguments
    w = unpack(tuple(tensors))
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


def _op_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, _mixer_backward_op, grad)


_mixer_op.register_autograd(_op_backward, setup_context=_remember)
