"""The effective receptive field of the class token: which patches its features depend on.

    R_t = || d f / d x_t ||_F       f  features that enter the head, (d_model,)
                                    x_t  token t of the embedded image, before the first block

The prompts of every block are on the way from x to f, so R shows what they change.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from svp_peft.adapters import disable_adapter
from svp_peft.errors import BackboneNotSupportedError, InputError
from svp_peft.state import SVPState, patched_model
from svp_peft.visualize.capture import (
    checked_state,
    eager_evaluation,
    first_input,
    image_grid,
    patch_positions,
)


class ReceptiveField(NamedTuple):
    """What `receptive_field` returns; maps in image order, without class tokens."""

    before: Tensor
    """Of the base model, float32 (batch, rows, columns)."""
    after: Tensor
    """Of the model with its active adapter, like `before`."""

    @property
    def change(self) -> Tensor:
        """How the share of each patch changed: after / sum(after) - before / sum(before)."""
        return _shares(self.after) - _shares(self.before)


def receptive_field(model: nn.Module, images: Tensor, *, probes: int = 16) -> ReceptiveField:
    """How strongly the features that enter the head depend on each patch, before and after.

    R_t is the Frobenius norm of the Jacobian of the features with respect to token t. Without a
    class token the features are the pooled tokens. The norm is estimated from `probes` random
    orthogonal directions q_i of the feature space, the same in every call:

        R_t^2 ~ d_model / probes * sum_i || q_i^T df/dx_t ||^2         exact for probes >= d_model

    The model's state, mode and gradients stay as they are.

    Args:
        model: patched by `apply_svp` or `load_adapter`.
        images: float (batch, channels, height, width), as the model takes them.
        probes: backward passes for each of the two maps.

    Returns:
        A `ReceptiveField`.

    Raises:
        NotAppliedError: the model carries no SVP.
        InputError: no probe, no batch of images, or called inside `route` or `disable_adapter`.
        BackboneNotSupportedError: the model's features cannot be seen.

    Source: effective receptive fields, arXiv 1701.04128; here over tokens instead of pixels.
    """
    model = patched_model(model)
    svp = checked_state(model, images, "receptive_field")
    if probes < 1:
        raise InputError(f"probes={probes} must be at least 1: each is a backward pass. Try 16.")
    with eager_evaluation(model):
        with disable_adapter(model):
            before = _jacobian_norms(model, svp, images, probes)
        after = _jacobian_norms(model, svp, images, probes)
        grid = image_grid(model, svp.spec, images, before.shape[-1])
    return ReceptiveField(before.unflatten(-1, grid), after.unflatten(-1, grid))


def _jacobian_norms(model: nn.Module, svp: SVPState, images: Tensor, probes: int) -> Tensor:
    """R_t of every patch, float32 (batch, M)."""
    tokens: list[Tensor] = []
    features: list[Tensor] = []

    def cut_graph(x: Tensor) -> Tensor:
        tokens.append(x.detach().requires_grad_())
        return tokens[-1]

    with ExitStack() as stack, torch.enable_grad():
        first_block = model.get_submodule(svp.spec.blocks[0])
        # before the prompts of block 0, so that they count
        stack.enter_context(first_input(first_block, svp.spec.input_name, cut_graph, first=True))
        if svp.spec.head is not None:
            head = model.get_submodule(svp.spec.head)
            stack.enter_context(first_input(head, "input", features.append))
        output = model(images)
    if svp.spec.head is None:
        features = [output]
    if not features or not isinstance(features[0], Tensor) or features[0].grad_fn is None:
        raise BackboneNotSupportedError(
            f"the features of {type(model).__name__} cannot be seen: its head "
            f"{svp.spec.head!r} was not called with a tensor that depends on the tokens. "
            "Pass backbone=BackboneSpec(head=...) to apply_svp to say where the head is."
        )
    f = features[0]
    if f.dim() == 3:  # tokens that are pooled after the head
        f = f.mean(dim=1)
    squares = torch.zeros(tokens[0].shape[:2], device=f.device)
    for direction in _orthogonal(f.shape[-1], probes).to(f):
        (gradient,) = torch.autograd.grad(f, tokens[0], direction.expand_as(f), retain_graph=True)
        squares += gradient.float().square().sum(-1)
    norms = (squares * f.shape[-1] / min(probes, f.shape[-1])).sqrt()
    return norms[:, patch_positions(svp.spec, 0, norms.shape[1])]


def _orthogonal(width: int, count: int) -> Tensor:
    """Orthonormal rows (min(count, width), width); the unit vectors if all are asked for."""
    if count >= width:
        return torch.eye(width)
    gaussian = torch.randn(width, count, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(gaussian).Q.T


def _shares(maps: Tensor) -> Tensor:
    total = maps.sum((-2, -1), keepdim=True)
    # a model whose class token sees no patch has no shares to compare
    return maps / total.clamp_min(torch.finfo(maps.dtype).tiny)
