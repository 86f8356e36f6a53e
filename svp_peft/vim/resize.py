"""Position embeddings for another image size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cls_slots(num_patches: int, num_tokens: int, middle: bool) -> tuple[int, ...]:
    """Indices of the class tokens in the sequence.

    None, one at num_patches // 2 or at the head, or two at the ends.
    """
    if num_tokens == 2:
        return 0, num_patches + 1
    if num_tokens == 1:
        return (num_patches // 2 if middle else 0,)
    return ()


def resize_pos_embed(
    pos_embed: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    num_tokens: int,
    middle: bool,
) -> Tensor:
    """Interpolate the patches' embeddings; those of the class tokens are kept as they are.

    The class tokens' slots are where the model puts the tokens, in the old grid and in the new
    one. (The official script takes slot 0 for any class token, which scrambles a middle one.)

    Args:
        pos_embed: float (1, rows * columns + num_tokens, d_model).
        old_grid, new_grid: rows and columns of patches.
        num_tokens: 0, 1 or 2 class tokens.
        middle: whether a single class token stands in the middle instead of at the head.

    Returns:
        (1, new rows * new columns + num_tokens, d_model), float32 if a resize was needed.
    """
    if old_grid == new_grid:
        return pos_embed
    old_count, new_count = old_grid[0] * old_grid[1], new_grid[0] * new_grid[1]
    slots = cls_slots(old_count, num_tokens, middle)
    is_patch = torch.ones(old_count + num_tokens, dtype=torch.bool)
    is_patch[list(slots)] = False
    grid = pos_embed[0, is_patch].float().T.reshape(1, -1, *old_grid)
    grid = F.interpolate(grid, size=new_grid, mode="bicubic", align_corners=False)
    patches = grid.flatten(2).transpose(1, 2)
    for old, new in zip(slots, cls_slots(new_count, num_tokens, middle), strict=True):
        token = pos_embed[:, old : old + 1].float()
        patches = torch.cat((patches[:, :new], token, patches[:, new:]), dim=1)
    return patches
