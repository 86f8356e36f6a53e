"""The prompts of several adapters on one batch, in batched products instead of one after the other.

On a GPU eight adapters on eight images each would be eight times as many kernels, each too small
to fill it. Here images are laid out as (adapters, images, L, d_model), padded to the largest group,
and every product is one batched product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from svp_peft.ops.reference import positions_mask
from svp_peft.prompters import SVPAdapter

# padded images per image above which one product per adapter does less work
_MOST_PADDING = 2.0


def can_group(adapters: Sequence[SVPAdapter], sizes: Sequence[int], block: int) -> bool:
    """Whether `prompt_grouped` can stand for one call per adapter, and is worth it.

    Args:
        sizes: images of each adapter.
    """
    first = adapters[0].config
    alike = all(
        block in adapter.layers
        and not adapter.released
        and not (adapter.training and adapter.dropout > 0)
        and adapter.config.inner_bottleneck == first.inner_bottleneck
        and adapter.config.use_cross
        and adapter.config.use_inner
        for adapter in adapters
    )
    padded = max(sizes) * len(sizes) / sum(sizes)
    return alike and len(adapters) > 1 and padded <= _MOST_PADDING


def prompt_grouped(
    parts: Sequence[Tensor], adapters: Sequence[SVPAdapter], block: int, skip: Sequence[int]
) -> list[Tensor]:
    """Each part prompted by its own adapter; the formula is that of prompters.py.

    Args:
        parts: tokens entering a block, float (images of the adapter, L, d_model), one per adapter.
        skip: positions of the class tokens, sorted, each in 0..L-1.

    Returns:
        Prompted tokens, each of the shape and dtype of its part.
    """
    sizes = [part.shape[0] for part in parts]
    length, width = parts[0].shape[1:]
    most = max(sizes)
    padded = [
        F.pad(part, (0, 0, 0, 0, 0, most - size)) for part, size in zip(parts, sizes, strict=True)
    ]
    x = torch.stack(padded).flatten(1, 2)  # (adapters, images * L, d_model)

    found = [adapter.parts(block) for adapter in adapters]
    cross_weight = torch.stack([cross.weight for cross, *_ in found])  # type: ignore[union-attr]
    cross_bias = torch.stack([cross.bias for cross, *_ in found])  # type: ignore[union-attr]
    down_weight = torch.stack([inner.down.weight for _, inner, *_ in found])  # type: ignore[union-attr]
    down_bias = torch.stack([inner.down.bias for _, inner, *_ in found])  # type: ignore[union-attr]
    up_weight = torch.stack([inner.up.weight for _, inner, *_ in found])  # type: ignore[union-attr]
    up_bias = torch.stack([inner.up.bias for _, inner, *_ in found])  # type: ignore[union-attr]
    alpha = torch.stack([alpha for _, _, alpha, _ in found])  # type: ignore[arg-type, misc]
    beta = torch.stack([beta for *_, beta in found])  # type: ignore[arg-type, misc]

    def linear(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.baddbmm(bias[:, None], tokens, weight.transpose(1, 2))

    autocast = torch.is_autocast_enabled(x.device.type)
    tokens = x if autocast else x.to(torch.promote_types(x.dtype, cross_weight.dtype))
    compute = torch.promote_types(x.dtype, torch.float32)
    cross = F.silu(linear(tokens, cross_weight, cross_bias).to(compute))
    inner = linear(linear(tokens, down_weight, down_bias), up_weight, up_bias)
    prompt = alpha[:, None] * cross + beta[:, None] * F.silu(inner.to(compute))
    prompt = prompt.unflatten(1, (most, length))
    if skip:
        special = positions_mask(length, skip, x.device)
        prompt = prompt.masked_fill(special[:, None], 0.0)
    out = (x.view(len(parts), most, length, width).to(compute) + prompt).to(x.dtype)
    return [rows[:size] for rows, size in zip(out, sizes, strict=True)]
