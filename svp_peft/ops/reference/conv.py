"""The causal depthwise convolution of the mixer with its SiLU, in plain PyTorch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_silu(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    reverse: Sequence[bool],
) -> tuple[Tensor, ...]:
    """One short convolution over the tokens per direction, channels-last.

        out[t] = SiLU(bias + sum_j weight[:, j] * x[t - (width - 1) + j])

    A reversed direction sees the tokens after t instead of those before it:
    x[t + (width - 1) - j] takes the place of x[t - (width - 1) + j].

    Args:
        x: float (batch, L, d_inner).
        weight: per direction, (d_inner, width); `width` is 4 in every published model.
        bias: per direction, (d_inner,), or None.
        reverse: per direction, True where the scan runs from the last token to the first.

    Returns:
        Per direction, (batch, L, d_inner) in x's dtype, computed in float32 (float64 stays).
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    channels_first = x.to(compute).transpose(1, 2)
    outputs = []
    for k, back in enumerate(reverse):
        taps = weight[k].to(compute)
        width = taps.shape[1]
        padding = (0, width - 1) if back else (width - 1, 0)
        convolved = F.conv1d(
            F.pad(channels_first, padding),
            (taps.flip(1) if back else taps)[:, None],
            None if bias is None else bias[k].to(compute),
            groups=taps.shape[0],
        )
        outputs.append(F.silu(convolved).transpose(1, 2).to(x.dtype).contiguous())
    return tuple(outputs)
