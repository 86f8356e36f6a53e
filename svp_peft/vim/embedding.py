"""From an image to tokens: patches, and rotary position tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svp_peft.errors import InputError
from svp_peft.vim.arguments import pair
from svp_peft.vim.bare import is_bare


def grid_of(
    img_size: tuple[int, int], patch_size: tuple[int, int], stride: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns of patches; 0 or less where the image is smaller than a patch."""
    rows, columns = (
        (size - patch) // step + 1
        for size, patch, step in zip(img_size, patch_size, stride, strict=True)
    )
    return rows, columns


class PatchEmbed(nn.Module):
    """A convolution that turns patches, overlapping where stride < patch_size, into tokens."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.img_size = pair(img_size, "img_size")
        self.patch_size = pair(patch_size, "patch_size")
        self.stride = pair(stride, "stride")
        self.grid_size = grid_of(self.img_size, self.patch_size, self.stride)
        if min(self.grid_size) < 1:
            raise InputError(
                f"img_size={self.img_size} is smaller than patch_size={self.patch_size}, so there "
                f"is no patch at all. Use a larger image or smaller patches."
            )
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(
            in_chans, embed_dim, self.patch_size, self.stride, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, in_chans, height, width) -> tokens (batch, num_patches, embed_dim).

        Raises:
            InputError: the images are not of the size the model was built for.
        """
        if x.dim() != 4 or tuple(x.shape[2:]) != self.img_size:
            raise InputError(
                f"images of shape {tuple(x.shape)} were given to a model built for (batch, "
                f"{self.proj.in_channels}, {self.img_size[0]}, {self.img_size[1]}). Resize the "
                f"images, or build the model with img_size=(height, width)."
            )
        if x.is_cuda and self.stride == self.patch_size and is_bare(self.proj, nn.Conv2d):
            # patches that do not overlap are one matrix product, which cuDNN does not notice:
            # its convolution takes thirty times as long in bfloat16
            if torch.is_autocast_enabled("cuda"):
                x = x.to(torch.get_autocast_dtype("cuda"))
            (rows, columns), (height, width) = self.grid_size, self.patch_size
            inside = x[..., : rows * height, : columns * width]
            patches = inside.unflatten(3, (columns, width)).unflatten(2, (rows, height))
            patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
            return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        return self.proj(x).flatten(2).transpose(1, 2)


class RotaryEmbedding(nn.Module):
    """Rotates channel pairs of each token by angles of its row and column.

        t'[2k]   = t[2k] cos(a) - t[2k+1] sin(a)
        t'[2k+1] = t[2k+1] cos(a) + t[2k] sin(a)

    The first half of the channels takes the row, the second the column. The tables are persistent
    buffers `freqs_cos` and `freqs_sin`, (grid * grid, d_model), and so part of the state_dict.

    With an odd number of tokens the first one is left alone. That suits a class token at the head;
    hustvl/Vim does the same with one in the middle. Source: hustvl/Vim, vim/rope.py.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(
        self,
        d_model: int,
        grid: int,
        pretrained_grid: int,
        theta: float = 10000.0,
        device: torch.device | str | None = None,
    ) -> None:
        """
        Args:
            d_model: token width, a multiple of 4.
            grid: patches per side.
            pretrained_grid: patches per side that the angles are scaled to.
            theta: base of the frequencies.
        """
        super().__init__()
        half = d_model // 2
        frequencies = 1.0 / theta ** (torch.arange(0, half, 2, device=device).float() / half)
        position = torch.arange(grid, device=device) / grid * pretrained_grid
        angles = torch.outer(position, frequencies).repeat_interleave(2, dim=-1)
        rows = angles[:, None, :].expand(grid, grid, half)
        columns = angles[None, :, :].expand(grid, grid, half)
        table = torch.cat((rows, columns), dim=-1).reshape(grid * grid, d_model)
        self.register_buffer("freqs_cos", table.cos())
        self.register_buffer("freqs_sin", table.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, L, d_model) -> the same shape; L is the grid's size, plus one where odd."""
        skip = tokens.shape[1] % 2
        patches = tokens[:, skip:]
        turned = torch.stack((-patches[..., 1::2], patches[..., ::2]), dim=-1).flatten(-2)
        rotated = patches * self.freqs_cos + turned * self.freqs_sin
        return torch.cat((tokens[:, :skip].to(rotated.dtype), rotated), dim=1) if skip else rotated
