"""Whether a run of blocks may be computed by one op, and what that op needs to know of them.

It may where calling the blocks one by one would do nothing else: frozen, without a hook but the one
that prompts, nothing wrapped or replaced. Otherwise the blocks are called.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from svp_peft import ops
from svp_peft.vim.bare import every_module_is_hooked, is_bare, is_hooked
from svp_peft.vim.block import Block, DropPath, RMSNorm
from svp_peft.vim.mixer import VimMixer

_FORWARD = (Block.forward, VimMixer.forward)


@runtime_checkable
class Prompting(Protocol):
    """A forward pre-hook of a block that adds prompts, and can say which."""

    def weights_of(self, block: nn.Module, length: int) -> ops.PromptWeights | bool:
        """What to prompt with; True for no prompt, False where the hook has to be called.

        Args:
            length: tokens per image.
        """
        ...


class Stacked(Protocol):
    """What a model with a stack of blocks has."""

    layers: nn.ModuleList
    if_rope: bool
    grad_checkpointing: bool


def run(
    model: Stacked, hidden: Tensor, residual: Tensor | None, inference_params: object
) -> tuple[Tensor, Tensor] | None:
    """What all blocks but the first make of (hidden, residual), computed at once; None where they
    have to be called."""
    if torch.compiler.is_compiling():  # a compiler joins the blocks itself
        return None
    if (Block.forward, VimMixer.forward) != _FORWARD:  # someone has replaced them for all blocks
        return None
    if residual is None or hidden.dtype.itemsize != 2 or every_module_is_hooked():
        return None
    if model.if_rope or model.grad_checkpointing or inference_params is not None:
        return None
    blocks, given = list(model.layers)[1:], []
    for block in blocks:
        found = _frozen(block, hidden)
        if found is None:
            return None
        given.append(found)
    first: VimMixer = blocks[0].mixer  # type: ignore[assignment]
    return ops.frozen_stack(hidden, residual, given, cache=first._frozen.stack)


def _frozen(block: nn.Module, hidden: Tensor) -> ops.FrozenBlock | None:
    """The block as the op takes it; None where it has to be called."""
    if type(block) is not Block or not block.fused_add_norm or block._forward_hooks:
        return None
    # a copy made by nn.DataParallel shares its hooks with the original
    copied = getattr(block, "_is_replica", False)
    if copied or block._backward_hooks or block._backward_pre_hooks or "forward" in block.__dict__:
        return None
    if block._compiled_call_impl is not None:  # by `block.compile()`
        return None
    modules = block._modules
    mixer, norm, dropping = modules["mixer"], modules["norm"], modules["drop_path"]
    if type(mixer) is not VimMixer or is_hooked(mixer) or mixer.init_layer_scale is not None:
        return None
    weights = mixer.frozen_weights()
    if (
        weights is None
        or norm is None
        or not (is_bare(norm, RMSNorm) or is_bare(norm, nn.LayerNorm))
    ):
        return None
    # not from its list of parameters: sharded models put plain tensors in their place
    norm_weight: Tensor = norm.weight  # type: ignore[assignment]
    norm_bias: Tensor | None = norm.bias  # type: ignore[assignment]
    if norm_weight.requires_grad or (norm_bias is not None and norm_bias.requires_grad):
        return None
    rate = 0.0
    if type(dropping) is DropPath and not is_hooked(dropping):
        rate = dropping.drop_prob if dropping.training else 0.0
    elif type(dropping) is not nn.Identity or is_hooked(dropping):
        return None
    prompt: ops.PromptWeights | None = None
    for hook in block._forward_pre_hooks.values():
        found = hook.weights_of(block, hidden.shape[1]) if isinstance(hook, Prompting) else False
        if found is False or prompt is not None:
            return None
        prompt = None if found is True else found  # type: ignore[assignment]
    return ops.FrozenBlock(
        mixer=weights,
        mixer_cache=mixer._frozen,
        mixer_scale=mixer._scale,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=norm.eps,  # type: ignore[arg-type]
        rms=type(norm) is RMSNorm,
        drop_rate=rate,
        prompt=prompt,
    )
