"""One Vim block: add, normalise, mix. And the two small layers it is made of."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from svp_peft import ops
from svp_peft.vim.bare import is_bare, is_hooked
from svp_peft.vim.mixer import VimMixer


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32.

    Parameters as in mamba-ssm's RMSNorm: `weight` (d_model,), and `bias` which is None.
    """

    bias: None

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) -> the same shape and dtype."""
        return ops.add_norm(x, None, self.weight, None, eps=self.eps, rms=True)[0]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class DropPath(nn.Module):
    """Stochastic depth: while training, zero whole samples and scale up the ones kept."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ...) -> the same shape; the identity in evaluation mode."""
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask / keep if keep > 0.0 else mask)

    def draw(self, x: Tensor) -> Tensor | None:
        """Which samples of x stay, float32 (batch,) of zeros and ones; None where all do."""
        if not self.training or self.drop_prob == 0.0:
            return None
        mask = torch.empty(x.shape[0], device=x.device, dtype=torch.float32)
        return mask.bernoulli_(1.0 - self.drop_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


def _is_bare_drop(module: nn.Module | None) -> TypeGuard[DropPath]:
    """Whether this is stochastic depth and nothing else: no subclass, no hook."""
    return type(module) is DropPath and not is_hooked(module)


def drop_path(rate: float) -> nn.Module:
    """`DropPath`, or the identity where nothing would be dropped."""
    return DropPath(rate) if rate > 0.0 else nn.Identity()


def drop_rates(last: float, depth: int) -> list[float]:
    """Rate of each block: the first two drop nothing, then a line that ends one short of `last`."""
    return [0.0, *torch.linspace(0.0, last, depth, device="cpu").tolist()][:depth]


def add_norm(
    hidden: Tensor,
    residual: Tensor | None,
    norm: nn.Module,
    *,
    fused: bool,
    residual_in_fp32: bool,
    dropping: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """Add `hidden` to the residual stream and normalise the sum.

    Fused: one op; the sum is normalised before it is rounded to the residual's dtype, and the
    result has hidden's dtype. Otherwise: the rounded sum, cast to the norm's dtype. Both hold in
    hustvl/Vim; they differ in half precision only. A norm that is wrapped is always called.

    Args:
        dropping: stochastic depth, applied to `hidden` before it is added. On a GPU the fused op
            does it on the way.

    Returns:
        The normalised sum and the residual. `residual_in_fp32` keeps the latter in float32
        (float64 stays as it is).
    """
    bare = is_bare(norm, RMSNorm) or is_bare(norm, nn.LayerNorm)
    mask, scale = None, 1.0
    if fused and bare and hidden.is_cuda and _is_bare_drop(dropping):
        mask = dropping.draw(hidden)
        # where everything is dropped there is nothing to scale up
        kept = 1.0 if mask is None else 1.0 - dropping.drop_prob
        scale = 1.0 / kept if kept > 0.0 else 1.0
    elif dropping is not None:
        hidden = dropping(hidden)
    if fused and bare and isinstance(norm, (RMSNorm, nn.LayerNorm)):
        residual_dtype = hidden.dtype if residual is None else residual.dtype
        if residual is None and residual_in_fp32:
            residual_dtype = torch.promote_types(hidden.dtype, torch.float32)
        return ops.add_norm(
            hidden,
            residual,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            rms=isinstance(norm, RMSNorm),
            residual_dtype=residual_dtype,
            drop_mask=mask,
            drop_scale=scale,
        )
    total = hidden if residual is None else residual + hidden
    weight = getattr(norm, "weight", None)
    normed = norm(total if weight is None else total.to(weight.dtype))
    if residual_in_fp32:
        total = total.to(torch.promote_types(total.dtype, torch.float32))
    return normed, total


class Block(nn.Module):
    """residual += drop_path(hidden); hidden = mixer(norm(residual))."""

    def __init__(
        self,
        mixer: VimMixer,
        norm: nn.Module,
        *,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.layer_idx = mixer.layer_idx
        self.mixer = mixer
        self.norm = norm
        self.drop_path = drop_path(drop_path_rate)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: object = None,
    ) -> tuple[Tensor, Tensor]:
        """One step of the stack.

        Args:
            hidden_states: what the previous mixer returned, float (batch, L, d_model); the
                embedded tokens in the first block.
            residual: the residual stream, (batch, L, d_model); None in the first block.
            inference_params: must be None.

        Returns:
            The mixer's output and the new residual, which does not contain it yet.
        """
        # the first block's input is the image itself and is never dropped
        dropping = None if residual is None else self.drop_path
        normed, residual = add_norm(
            hidden_states,
            residual,
            self.norm,
            fused=self.fused_add_norm,
            residual_in_fp32=self.residual_in_fp32,
            dropping=dropping,
        )
        return self.mixer(normed, inference_params=inference_params), residual
