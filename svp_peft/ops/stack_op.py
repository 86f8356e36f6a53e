"""Consecutive frozen blocks and their prompts as one op, where a backend has one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svp_peft.ops.backends import choose, kernels, provides
from svp_peft.ops.casting import compute_dtype
from svp_peft.ops.mixer_op import keep_level, prepared_mixer
from svp_peft.ops.prompt_op import KEEP_PRE_ACTIVATIONS, is_plain, product_dtype
from svp_peft.ops.types import Cache, FrozenBlock, PromptWeights, StackKeep

_NUMBERS = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels read


def frozen_stack(
    hidden: Tensor,
    residual: Tensor,
    blocks: Sequence[FrozenBlock],
    *,
    cache: Cache,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Prompt, drop, add, normalise and mix, block by block; None where no backend does it at once.

        x'       = prompt(x)                     see `svp_prompt`; x where the block has none
        residual = residual + drop(x')
        x        = mixer(norm(residual))         see `mixer` and `add_norm`

    Where nothing is dropped, the result is that of the ops one by one, but for the order of float32
    sums in the products of the prompts: an element of cross or inner may be rounded to the
    neighbouring number of the compute dtype. Drops are drawn for all blocks at once. The host
    launches fewer kernels and keeps one autograd node instead of three a block.

    Args:
        hidden: float (batch, L, d_model), what the mixer before the first block returned.
        residual: (batch, L, d_model), the residual stream, without `hidden`.
        blocks: frozen but for their prompts.
        cache: kept by the caller for this stack, so that a backend may prepare it.
        backend: see `svp_peft.set_backend`; None takes the process default.

    Returns:
        What the last mixer returned and the residual stream, which does not contain it yet.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    dtype = compute_dtype(hidden)
    if hidden.dtype != dtype or dtype.itemsize != 2 or hidden.numel() == 0 or not blocks:
        return None
    # the C++ kernels are float32: halves on a CPU take plain PyTorch, as in `mixer`
    working = torch.float32 if hidden.device.type == "cpu" else dtype
    name = choose(backend, hidden.device, working)
    if not provides(name, "frozen_stack") or not _fit(hidden, residual, blocks):
        return None
    mixers: list[Any] = []
    for block in blocks:
        prepared = prepared_mixer(block.mixer_cache, block.mixer, dtype, block.mixer_scale)
        if prepared is None:
            return None
        mixers.append(prepared)
    keep = _keep(hidden, residual, blocks)
    return kernels(name).frozen_stack(hidden, residual, blocks, mixers, keep, cache)  # type: ignore[no-any-return]


def _fit(hidden: Tensor, residual: Tensor, blocks: Sequence[FrozenBlock]) -> bool:
    """Whether one choice of kernels serves all blocks.

    What does not fit together is no error here: calling the blocks says what is wrong.
    """
    width = hidden.shape[2]
    prompts = [block.prompt for block in blocks if block.prompt is not None]
    return (
        width % 8 == 0
        and residual.dtype in _NUMBERS
        and residual.shape == hidden.shape
        and residual.device == hidden.device
        and len({(b.eps, b.rms) for b in blocks}) == 1
        and _are_alike([b.norm_weight for b in blocks], hidden)
        and _are_alike([b.norm_bias for b in blocks], hidden)
        and len({_shape(prompt) for prompt in prompts}) <= 1
        and (not prompts or _is_served(prompts, hidden))
    )


def _are_alike(parameters: Sequence[Tensor | None], hidden: Tensor) -> bool:
    """Whether these are parameters of one kind, one per block, that a kernel can read."""
    first = parameters[0]
    if first is None:
        return not any(p is not None for p in parameters)
    shape, dtype, device = (hidden.shape[2],), first.dtype, hidden.device
    return dtype in _NUMBERS and all(
        p is not None
        and p.dtype == dtype
        and p.shape == shape
        and p.device == device
        and p.is_contiguous()
        for p in parameters
    )


def _shape(prompt: PromptWeights) -> tuple[Any, ...]:
    shapes = tuple([t.shape for t in prompt.projections])
    return prompt.skip, shapes, id(prompt.alpha), id(prompt.beta)


def _is_served(prompts: Sequence[PromptWeights], hidden: Tensor) -> bool:
    """Whether the kernels take these prompts, of which the shapes are the same."""
    width, device, first = hidden.shape[2], hidden.device, prompts[0]
    alpha, beta, down, skip = first.alpha, first.beta, first.projections[2], first.skip
    bottleneck = down.shape[0]
    inner = ((bottleneck, width), (bottleneck,), (width, bottleneck), (width,))
    return (
        bottleneck % 8 == 0
        and tuple(t.shape for t in first.projections) == ((width, width), (width,), *inner)
        and alpha.dim() == beta.dim() == 2
        and alpha.shape[1] == beta.shape[1] == width
        and all(p.alpha_row < len(alpha) and p.beta_row < len(beta) for p in prompts)
        and is_plain(alpha, device)
        and is_plain(beta, device)
        and all(is_plain(t, device) for p in prompts for t in p.projections)
        and product_dtype(hidden, down) == hidden.dtype
        and (not skip or skip[-1] < hidden.shape[1])
    )


def _keep(hidden: Tensor, residual: Tensor, blocks: Sequence[FrozenBlock]) -> StackKeep | None:
    """None where nothing needs a gradient."""
    if not torch.is_grad_enabled():
        return None
    first = len(blocks)
    if hidden.requires_grad or residual.requires_grad:
        first = 0
    else:
        for number, block in enumerate(blocks):
            if block.prompt is not None and any(
                t.requires_grad
                for t in (*block.prompt.projections, block.prompt.alpha, block.prompt.beta)
            ):
                first = number
                break
    if first == len(blocks):
        return None
    return StackKeep(
        first, keep_level(hidden, blocks[0].mixer), hidden.numel() <= KEEP_PRE_ACTIVATIONS
    )
