"""The two SVP prompts added to the tokens of a batch that several adapters share, on the GPU."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from svp_peft.ops.cuda.kernels import CPP_TYPE, Kernel
from svp_peft.ops.cuda.layout import device_index, element_size, pack_of, rows


def prompt_rows(
    x: Tensor,
    cross: Tensor,
    inner: Tensor,
    alpha: Tensor,
    beta: Tensor,
    places: Tensor,
    skip: Sequence[int],
) -> Tensor:
    """`prompt` of prompt.py in a batch of several adapters, without a derivative.

    Args:
        x: (batch, L, d_model). Not modified.
        cross, inner: prompter outputs before the activation, (adapters, most, L, d_model), equally
            spaced rows of x's dtype.
        alpha, beta: scales, (adapters, d_model).
        places: int64 (batch,), where each row stands in `cross` flattened to (adapters * most, L,
            d_model); a row beyond its end has no prompt.

    Returns:
        (batch, L, d_model) in x's dtype; bit for bit x at rows without a prompt and at `skip`.
    """
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    if x.numel() == 0:
        return out
    x = x.contiguous()
    adapters, most, length, width = cross.shape
    cross, cross_row = rows(cross.to(x.dtype).flatten(0, 1))
    inner, inner_row = rows(inner.to(x.dtype).flatten(0, 1))
    alpha, beta = alpha.float().contiguous(), beta.float().contiguous()
    size = element_size(x.dtype)
    units = [t.data_ptr() // size for t in (x, cross, inner)]
    pack = pack_of(width, 16 // size, cross_row, inner_row, *units)
    kernel = _rows_kernel(device_index(x), CPP_TYPE[x.dtype], width, pack, tuple(skip))
    tokens = x.shape[0] * length
    kernel(
        (-(-tokens * (width // pack) // 256), 1, 1),
        x.data_ptr(), cross.data_ptr(), inner.data_ptr(), alpha.data_ptr(), beta.data_ptr(),
        places.data_ptr(), out.data_ptr(),
        tokens, length, cross_row, inner_row, most, adapters * most,
    )  # fmt: skip
    return out


@functools.cache
def _rows_kernel(device: int, act: str, width: int, pack: int, skip: tuple[int, ...]) -> Kernel:
    macros = {
        "ACT": act,
        "D_MODEL": width,
        "PACK": pack,
        "IS_SKIPPED(t)": "||".join(f"(t)=={position}" for position in skip) or "false",
    }
    return Kernel("prompt_rows", "prompt_rows", macros, "7Q6i", device, threads=256)
