"""Initialisation of a new model, as in hustvl/Vim."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from svp_peft.vim.mixer import VimMixer

_TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal cut at two standard deviations."""


def new_embedding(shape: tuple[int, ...], factory: dict[str, Any]) -> nn.Parameter:
    """A class token or position table: truncated normal, std 0.02."""
    parameter = nn.Parameter(torch.empty(shape, **factory))
    nn.init.trunc_normal_(parameter, std=0.02)
    return parameter


def init_head(head: nn.Module) -> None:
    """Truncated normal weights (std 0.02), zero biases."""
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_patches(proj: nn.Conv2d) -> None:
    """LeCun normal: variance 1 / fan_in, cut at two standard deviations; zero bias."""
    std = math.sqrt(1.0 / proj.weight[0].numel()) / _TRUNCATED_STD
    nn.init.trunc_normal_(proj.weight, std=std, a=-2 * std, b=2 * std)
    if proj.bias is not None:
        nn.init.zeros_(proj.bias)


def new_head(d_model: int, num_classes: int, like: Tensor) -> nn.Module:
    """A freshly initialised classifier beside `like`; the identity for 0 classes."""
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(d_model, num_classes, device=like.device, dtype=like.dtype)
    init_head(head)
    return head


@torch.no_grad()
def init_stack(
    model: nn.Module,
    depth: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Zero the biases of Linear layers (dt_proj's excepted), shrink out_proj with the depth.

    `initializer_range` is for embedding tables and a Vim has none; the fork's
    `initializer_cfg` may name it.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            if not getattr(module.bias, "_no_reinit", False):
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=initializer_range)
        elif isinstance(module, VimMixer) and rescale_prenorm_residual:
            nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
            module.out_proj.weight.div_(math.sqrt(n_residuals_per_layer * depth))
