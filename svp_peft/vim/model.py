"""Vision Mamba (Vim): the whole backbone and its classifier head."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svp_peft.errors import InputError
from svp_peft.vim import arguments, stack
from svp_peft.vim.adopt import adopt
from svp_peft.vim.block import Block, RMSNorm, add_norm, drop_path, drop_rates
from svp_peft.vim.embedding import PatchEmbed, RotaryEmbedding
from svp_peft.vim.init import init_head, init_patches, init_stack, new_embedding, new_head
from svp_peft.vim.mixer import VimMixer

POOL_TYPES = ("none", "mean", "max", "all")


class VisionMamba(nn.Module):
    """Vision Mamba with the constructor arguments and state_dict keys of hustvl/Vim.

        tokens = patches + class token(s) + pos_embed
        hidden, residual = block_l(hidden, residual)                     l = 0..depth-1
        logits = head(pool(norm_f(residual + hidden)))

    It needs no fork of mamba-ssm and runs on any device; the official checkpoints load with
    `strict=True`. Dropout of whole samples (`drop_path_rate`) is active in training mode, also in
    a frozen backbone.

    Source: hustvl/Vim, vim/models_mamba.py; Zhu et al., "Vision Mamba", ICML 2024.
    """

    cls_token: nn.Parameter
    cls_token_head: nn.Parameter
    cls_token_tail: nn.Parameter
    pos_embed: nn.Parameter
    rope: RotaryEmbedding
    layers: nn.ModuleList

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] = 16,
        depth: int = 24,
        embed_dim: int = 192,
        d_state: int = 16,
        channels: int = 3,
        num_classes: int = 1000,
        ssm_cfg: Mapping[str, Any] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = True,
        initializer_cfg: Mapping[str, Any] | None = None,
        fused_add_norm: bool = True,
        residual_in_fp32: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        ft_seq_len: int | None = None,
        pt_hw_seq_len: int = 14,
        if_bidirectional: bool = False,
        final_pool_type: str = "none",
        if_abs_pos_embed: bool = True,
        if_rope: bool = False,
        if_rope_residual: bool = False,
        flip_img_sequences_ratio: float = -1.0,
        if_bimamba: bool = False,
        bimamba_type: str = "v2",
        if_cls_token: bool = True,
        if_divide_out: bool | None = None,
        init_layer_scale: float | None = None,
        use_double_cls_token: bool = False,
        use_middle_cls_token: bool = True,
        if_devide_out: bool | None = None,
        drop_block_rate: None = None,
    ) -> None:
        """
        Args:
            img_size, patch_size, stride: one number or (height, width). A stride below patch_size
                makes the patches overlap.
            depth, embed_dim, d_state, channels: blocks, token width, SSM state size per channel,
                colours of the image.
            num_classes: 0 leaves the head out; the model then returns features.
            ssm_cfg: further arguments of `VimMixer`: d_state, d_conv, expand, dt_rank, ...
            drop_rate: dropout after the position embedding.
            drop_path_rate: stochastic depth, growing linearly over the blocks.
            rms_norm, norm_epsilon: RMSNorm or LayerNorm, and its epsilon.
            fused_add_norm, residual_in_fp32: dtype rules of the residual stream; see `add_norm`.
            initializer_cfg: arguments of `init_stack`.
            ft_seq_len: accepted and unused, as in hustvl/Vim; the rotary table fits the grid.
            pt_hw_seq_len: patches per side that the rotary angles are scaled to.
            if_bidirectional: run the blocks in pairs, the second one over the reversed tokens, and
                add up both; a last block without a partner is not used.
            final_pool_type: without a class token: "none" takes the last token, "mean" the mean,
                "all" keeps the tokens and "max" takes the maximum of the tokens' logits. With a
                class token the features are that token. "max" still takes a maximum over axis 1 of
                what the head returns, as in hustvl/Vim: over the classes.
            if_abs_pos_embed, if_rope, if_rope_residual: learned position embeddings; rotary ones
                on the hidden states before every block; and on the residual too.
            flip_img_sequences_ratio: probability of reversing the tokens, in evaluation too.
            if_bimamba: the old way to say bimamba_type="v1".
            bimamba_type, init_layer_scale: see `VimMixer`.
            if_cls_token, use_double_cls_token, use_middle_cls_token: no class token; one at each
                end; one at index num_patches // 2, else one at the head.
            if_divide_out: halve the sum of the directions of "v2"; None is True. Older releases
                spell it if_devide_out.
            drop_block_rate: must be None; the official training script passes it.

        Raises:
            InputError: an argument that cannot work.
        """
        super().__init__()
        divide = arguments.one_spelling(if_divide_out, if_devide_out)
        arguments.check_counts(1, embed_dim=embed_dim, d_state=d_state, channels=channels)
        arguments.check_counts(0, depth=depth, num_classes=num_classes)
        arguments.check_numbers(0.0, 1.0, drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        arguments.check_numbers(0.0, math.inf, norm_epsilon=norm_epsilon)
        arguments.check_numbers(
            -math.inf, math.inf, flip_img_sequences_ratio=flip_img_sequences_ratio
        )
        arguments.check_flags(
            rms_norm=rms_norm,
            fused_add_norm=fused_add_norm,
            residual_in_fp32=residual_in_fp32,
            if_bidirectional=if_bidirectional,
            if_abs_pos_embed=if_abs_pos_embed,
            if_rope=if_rope,
            if_rope_residual=if_rope_residual,
            if_bimamba=if_bimamba,
            if_cls_token=if_cls_token,
            use_double_cls_token=use_double_cls_token,
            use_middle_cls_token=use_middle_cls_token,
        )
        meaning = "it says how tokens become one feature where there is no class token"
        arguments.check_choice("final_pool_type", final_pool_type, POOL_TYPES, meaning)
        if drop_block_rate is not None:
            raise InputError(
                f"drop_block_rate={drop_block_rate!r} is not supported: a Vim has no feature maps "
                "to drop blocks from. Leave it out, or use drop_path_rate."
            )
        self.num_classes = num_classes
        self.d_model = self.num_features = self.embed_dim = embed_dim
        self.final_pool_type = final_pool_type
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.if_bidirectional = if_bidirectional
        self.if_abs_pos_embed = if_abs_pos_embed
        self.if_rope = if_rope
        self.if_rope_residual = if_rope_residual
        self.flip_img_sequences_ratio = flip_img_sequences_ratio
        self.if_cls_token = if_cls_token
        self.use_double_cls_token = use_double_cls_token
        self.use_middle_cls_token = use_middle_cls_token
        self.num_tokens = (2 if use_double_cls_token else 1) if if_cls_token else 0
        self.grad_checkpointing = False
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        self.patch_embed = PatchEmbed(img_size, patch_size, stride, channels, embed_dim, **factory)
        self.img_size = self.patch_embed.img_size
        if if_cls_token:
            for name in self._cls_names():
                self.register_parameter(name, new_embedding((1, 1, embed_dim), factory))
        if if_abs_pos_embed:
            positions = self.patch_embed.num_patches + self.num_tokens
            self.pos_embed = new_embedding((1, positions, embed_dim), factory)
            self.pos_drop = nn.Dropout(drop_rate)
        if if_rope:
            grid = self._rotary_grid()
            self.rope = RotaryEmbedding(embed_dim, grid, pt_hw_seq_len, device=device)
        head = nn.Linear(embed_dim, num_classes, **factory) if num_classes else nn.Identity()
        self.head: nn.Module = head

        def new_norm() -> nn.Module:
            kind = RMSNorm if rms_norm else nn.LayerNorm
            return kind(embed_dim, eps=norm_epsilon, **factory)

        mixer_arguments: dict[str, Any] = {
            "d_state": d_state,
            "bimamba_type": "v1" if if_bimamba else bimamba_type,
            "if_divide_out": divide,
            "init_layer_scale": init_layer_scale,
            **factory,
            **(ssm_cfg or {}),
        }
        self.layers = nn.ModuleList(
            Block(
                VimMixer(embed_dim, layer_idx=index, **mixer_arguments),
                new_norm(),
                fused_add_norm=fused_add_norm,
                residual_in_fp32=residual_in_fp32,
                drop_path_rate=rate,
            )
            for index, rate in enumerate(drop_rates(drop_path_rate, depth))
        )
        self.drop_path = drop_path(drop_path_rate)
        self.norm_f = new_norm()

        init_patches(self.patch_embed.proj)
        init_head(self.head)
        init_stack(self, depth, **(initializer_cfg or {}))

    def _cls_names(self) -> tuple[str, ...]:
        if self.use_double_cls_token:
            return "cls_token_head", "cls_token_tail"
        return ("cls_token",)

    def _rotary_grid(self) -> int:
        """Patches per side, after checking that rotation fits the tokens."""
        rows, columns = self.patch_embed.grid_size
        tokens = rows * columns + self.num_tokens
        if rows != columns or tokens - tokens % 2 != rows * columns or self.embed_dim % 4:
            raise InputError(
                f"if_rope=True needs a square grid with an even number of patches, at most one "
                f"class token and embed_dim a multiple of 4; the grid is {rows}x{columns} with "
                f"{self.num_tokens} class tokens and embed_dim={self.embed_dim}. The rotary table "
                f"skips one token where their number is odd. Set if_rope=False."
            )
        return rows

    @classmethod
    def from_model(cls, model: nn.Module, **overrides: Any) -> VisionMamba:
        """A VisionMamba over the parameters of a model built with a fork of mamba-ssm.

        Nothing is copied: both models hold the same `Parameter` objects, so training or loading
        one changes the other. See `svp_peft.vim.adopt.adopt`.

        Args:
            model: hustvl/Vim's VisionMamba or one with the same parameters.
            overrides: constructor arguments that `model` does not tell, or tells wrongly.

        Raises:
            InputError: `model` is not a Vim, or does not say where its class token is.
        """
        return adopt(cls, model, overrides)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that an optimiser should not decay, as timm asks for them."""
        return {"pos_embed", "cls_token", "dist_token", "cls_token_head", "cls_token_tail"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping what it computed."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new, freshly initialised head in place; 0 classes leave it out.

        Args:
            num_classes: classes of the new head.
            global_pool: if given, the new `final_pool_type`.
        """
        if global_pool is not None:
            self.final_pool_type = global_pool
        self.num_classes = num_classes
        self.head = new_head(self.embed_dim, num_classes, self.patch_embed.proj.weight)

    def forward(
        self,
        x: Tensor,
        return_features: bool = False,
        inference_params: object = None,
        if_random_cls_token_position: bool = False,
        if_random_token_rank: bool = False,
    ) -> Tensor:
        """Classify images.

        Args:
            x: normalised images, float (batch, channels, height, width).
            return_features: return what `forward_features` does.
            inference_params: must be None.
            if_random_cls_token_position: put a class token that is not a middle one anywhere.
            if_random_token_rank: shuffle the tokens.

        Returns:
            Logits (batch, num_classes). With final_pool_type "all" and no class token
            (batch, L, num_classes).

        Raises:
            InputError: images of another size, or inference_params.
        """
        features = self.forward_features(
            x, inference_params, if_random_cls_token_position, if_random_token_rank
        )
        if return_features:
            return features
        logits = self.head(features)
        return logits.max(dim=1).values if self.final_pool_type == "max" else logits

    def forward_features(
        self,
        x: Tensor,
        inference_params: object = None,
        if_random_cls_token_position: bool = False,
        if_random_token_rank: bool = False,
    ) -> Tensor:
        """Features after `norm_f`: (batch, d_model), or (batch, L, d_model) if not pooled."""
        tokens, positions = self._embed(x, if_random_cls_token_position)
        if if_random_token_rank:
            order = torch.randperm(tokens.shape[1])
            tokens = tokens[:, order.to(tokens.device)]
            positions = [int((order == p).nonzero()) for p in positions]
        ratio = self.flip_img_sequences_ratio
        flipped = ratio > 0 and ratio - random.random() > 1e-5
        if flipped:
            tokens = tokens.flip(1)
        hidden = self._final_norm(*self._run_blocks(tokens, flipped, inference_params))
        if positions:
            return torch.stack([hidden[:, p] for p in positions]).mean(0)
        if self.final_pool_type == "none":
            return hidden[:, -1]
        return hidden.mean(dim=1) if self.final_pool_type == "mean" else hidden

    def _embed(self, x: Tensor, random_position: bool) -> tuple[Tensor, list[int]]:
        """Tokens (batch, L, d_model) and the indices of the class tokens among them."""
        tokens = self.patch_embed(x)
        batch, num_patches, _ = tokens.shape
        positions: list[int] = []
        if self.if_cls_token and self.use_double_cls_token:
            head, tail = (getattr(self, name).expand(batch, -1, -1) for name in self._cls_names())
            tokens = torch.cat((head, tokens, tail), dim=1)
            positions = [0, num_patches + 1]
        elif self.if_cls_token:
            at = 0
            if self.use_middle_cls_token:
                at = num_patches // 2
            elif random_position:
                at = random.randint(0, num_patches)
            token = self.cls_token.expand(batch, -1, -1)
            tokens = torch.cat((tokens[:, :at], token, tokens[:, at:]), dim=1)
            positions = [at]
        if self.if_abs_pos_embed:
            tokens = self.pos_drop(tokens + self.pos_embed)
        return tokens, positions

    def _run_blocks(
        self, tokens: Tensor, flipped: bool, inference_params: object
    ) -> tuple[Tensor, Tensor | None]:
        hidden: Tensor = tokens
        residual: Tensor | None = None
        if not self.if_bidirectional:
            for index, block in enumerate(self.layers):
                if index == 1:  # the first block has no residual stream to add to
                    together = stack.run(self, hidden, residual, inference_params)
                    if together is not None:
                        return together
                hidden, residual = self._rotate(hidden, residual, flipped)
                hidden, residual = self._call(block, hidden, residual, inference_params)
            return hidden, residual
        for index in range(0, len(self.layers) - 1, 2):
            hidden, residual = self._rotate(hidden, residual, False)
            ahead = self._call(self.layers[index], hidden, residual, inference_params)
            reverse = None if residual is None else residual.flip(1)
            back = self._call(self.layers[index + 1], hidden.flip(1), reverse, inference_params)
            hidden, residual = (a + b.flip(1) for a, b in zip(ahead, back, strict=True))
        return hidden, residual

    def _call(
        self, block: nn.Module, hidden: Tensor, residual: Tensor | None, inference_params: object
    ) -> tuple[Tensor, Tensor]:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, hidden, residual, inference_params, use_reentrant=False)
        return block(hidden, residual, inference_params=inference_params)

    def _rotate(
        self, hidden: Tensor, residual: Tensor | None, flipped: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Rotary embedding of the stream; flipped tokens take the angles of their own patch."""
        if not self.if_rope:
            return hidden, residual

        def turn(x: Tensor) -> Tensor:
            return self.rope(x.flip(1)).flip(1) if flipped else self.rope(x)

        if residual is not None and self.if_rope_residual:
            residual = turn(residual)
        return turn(hidden), residual

    def _final_norm(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        # without a fused norm the official code does not drop a stack that has no block
        dropping = self.drop_path if self.fused_add_norm or residual is not None else None
        return add_norm(
            hidden,
            residual,
            self.norm_f,
            fused=self.fused_add_norm,
            residual_in_fp32=self.residual_in_fp32,
            dropping=dropping,
        )[0]
