"""Small look-alikes of the model families, written from their description.

Each reproduces the structure that svp_peft goes by (names of lists and attributes, what a block
takes and returns, where class tokens stand) and the traps of its family, with a cheap stand-in for
the mixer that mixes tokens in both directions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mixer(nn.Module):
    """Mixes tokens: a gated linear map plus running means from both ends."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, inference_params: object = None) -> Tensor:
        u = F.linear(x, self.in_proj.weight)
        steps = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=u.dtype)[:, None]
        forward = u.cumsum(1) / steps
        backward = u.flip(1).cumsum(1).div(steps).flip(1)
        return F.linear(F.silu(u) * (forward + 0.5 * backward), self.out_proj.weight)


class SplitBlock(nn.Module):
    """Vim's block: adds what comes in to the residual, returns (mixer output, residual)."""

    def __init__(self, d_model: int, index: int = 0) -> None:
        super().__init__()
        self.mixer = Mixer(d_model)
        self.norm = nn.LayerNorm(d_model)
        self.layer_idx = index

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: object = None
    ) -> tuple[Tensor, Tensor]:
        residual = hidden_states if residual is None else residual + hidden_states
        normed = self.norm(residual.to(self.norm.weight.dtype))
        return self.mixer(normed, inference_params=inference_params), residual


class VimLike(nn.Module):
    """hustvl/Vim in small: (hidden, residual) blocks, every kind of class token.

    Args:
        class_token: "middle", "head", "double" or "none".
        keywords: call the blocks by keyword.
        delete_cls_token: as the segmentation backbone does: no parameter, but the flag stays on.
    """

    def __init__(
        self,
        class_token: str = "middle",
        *,
        depth: int = 4,
        d_model: int = 16,
        patches: int = 4,
        num_classes: int = 5,
        keywords: bool = False,
        if_bidirectional: bool = False,
        delete_cls_token: bool = False,
    ) -> None:
        super().__init__()
        self.keywords, self.if_bidirectional = keywords, if_bidirectional
        self.if_cls_token = class_token != "none"
        self.use_middle_cls_token = class_token == "middle"
        self.use_double_cls_token = class_token == "double"
        self.flip_img_sequences_ratio = -1.0
        self.embed_dim = d_model
        self.patch_embed = nn.Conv2d(3, d_model, 4, 4)
        self.patch_embed.num_patches = patches * patches  # type: ignore[assignment]
        extra = {"none": 0, "double": 2}.get(class_token, 1)
        self.pos_embed = nn.Parameter(torch.randn(1, patches * patches + extra, d_model) * 0.02)
        if class_token == "double":
            self.cls_token_head = nn.Parameter(torch.randn(1, 1, d_model) * 0.02)
            self.cls_token_tail = nn.Parameter(torch.randn(1, 1, d_model) * 0.02)
        elif class_token != "none":
            self.cls_token = nn.Parameter(torch.randn(1, 1, d_model) * 0.02)
        self.layers = nn.ModuleList(SplitBlock(d_model, index) for index in range(depth))
        self.norm_f = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, num_classes) if num_classes else nn.Identity()
        if delete_cls_token:
            del self.cls_token
            self.pos_embed = nn.Parameter(self.pos_embed.detach()[:, 1:])

    def tokens(self, x: Tensor) -> tuple[Tensor, list[int]]:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        cls = getattr(self, "cls_token", None)
        positions: list[int] = []
        if hasattr(self, "cls_token_head"):
            head, tail = (
                t.expand(len(x), -1, -1) for t in (self.cls_token_head, self.cls_token_tail)
            )
            positions = [0, x.shape[1] + 1]
            x = torch.cat((head, x, tail), 1)
        elif cls is not None:
            position = x.shape[1] // 2 if self.use_middle_cls_token else 0
            positions = [position]
            x = torch.cat((x[:, :position], cls.expand(len(x), -1, -1), x[:, position:]), 1)
        return x + self.pos_embed, positions

    def forward_features(self, x: Tensor, inference_params: object = None) -> Tensor:
        hidden, positions = self.tokens(x)
        residual: Tensor | None = None
        if self.if_bidirectional:
            for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
                h_f, r_f = first(hidden, residual, inference_params=inference_params)
                flipped = None if residual is None else residual.flip([1])
                # one tensor goes to both blocks of a pair: prompting it in place would show here
                h_b, r_b = second(hidden.flip([1]), flipped, inference_params=inference_params)
                hidden, residual = h_f + h_b.flip([1]), r_f + r_b.flip([1])
        else:
            for layer in self.layers:
                if self.keywords:
                    hidden, residual = layer(residual=residual, hidden_states=hidden)
                else:
                    hidden, residual = layer(hidden, residual, inference_params=inference_params)
        x = self.norm_f((hidden + residual).to(self.norm_f.weight.dtype))
        return x[:, positions].mean(1) if positions else x.mean(1)

    def forward(
        self,
        x: Tensor,
        inference_params: object = None,
        if_random_cls_token_position: bool = False,
        if_random_token_rank: bool = False,
    ) -> Tensor:
        return self.head(self.forward_features(x, inference_params))
