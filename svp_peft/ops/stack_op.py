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

    Where nothing is dropped, the result is that of the ops one by one, to the bit; drops are drawn
    for all blocks at once. The host launches fewer kernels and keeps one autograd node instead of
    three a block.

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
    name = choose(backend, hidden.device, dtype)
    if not provides(name, "frozen_stack") or not _fit(hidden, blocks):
        return None
    mixers: list[Any] = []
    for block in blocks:
        prepared = prepared_mixer(block.mixer_cache, block.mixer, dtype, block.mixer_scale)
        if prepared is None:
            return None
        mixers.append(prepared)
    keep = _keep(hidden, residual, blocks)
    return kernels(name).frozen_stack(hidden, residual, blocks, mixers, keep, cache)  # type: ignore[no-any-return]


def _fit(hidden: Tensor, blocks: Sequence[FrozenBlock]) -> bool:
    """Whether one choice of kernels serves all blocks."""
    width = hidden.shape[2]
    norms = {
        (b.norm_weight.dtype, b.norm_bias is None, b.eps, b.rms, b.norm_weight.shape)
        for b in blocks
    }
    prompts = [block.prompt for block in blocks if block.prompt is not None]
    return (
        len(norms) == 1
        and width % 8 == 0
        and blocks[0].norm_weight.dtype.itemsize <= 4
        and blocks[0].norm_weight.shape == (width,)
        and all(b.norm_weight.is_contiguous() for b in blocks)
        and len({_shape(prompt) for prompt in prompts}) <= 1
        and all(_is_served(prompt, hidden) for prompt in prompts)
    )


def _shape(prompt: PromptWeights) -> tuple[Any, ...]:
    return prompt.skip, prompt.projections[2].shape, id(prompt.alpha), id(prompt.beta)


def _is_served(prompt: PromptWeights, hidden: Tensor) -> bool:
    width, down = hidden.shape[2], prompt.projections[2]
    return (
        down.shape[1] == width
        and down.shape[0] % 8 == 0
        and all(is_plain(t) for t in (*prompt.projections, prompt.alpha, prompt.beta))
        and product_dtype(hidden, down) == hidden.dtype
        and (not prompt.skip or prompt.skip[-1] < hidden.shape[1])
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
