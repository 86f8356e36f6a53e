"""Stock mamba-ssm and causal-conv1d as a backend, any release from 1.1; no fork is needed.

Their public functions are differentiable and channels-first, and know one direction: the other is
made by flips. Both directions and the division by two are always there, whatever the release.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from svp_peft.ops import reference
from svp_peft.ops.mamba_ssm import stock
from svp_peft.ops.types import MixerWeights

__all__ = ["conv_silu", "mixer", "scan", "unavailable"]


def unavailable(device: torch.device) -> str | None:
    """None where the kernels run on this device; else what is missing and how to get it."""
    reason = stock.not_installed()
    if reason is not None:
        return reason
    if device.type != "cuda":
        return (
            f"mamba-ssm's kernels are for GPUs and the tensors are on {device}. Move them to a GPU."
        )
    if not torch.cuda.is_available():
        return "torch finds no GPU. Install a driver, or a torch built with CUDA."
    return stock.not_importable()


def conv_silu(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    reverse: Sequence[bool],
) -> tuple[Tensor, ...]:
    """`svp_peft.ops.reference.conv_silu`: same arguments, same results; widths 2 to 4."""
    if x.numel() == 0:
        return reference.conv_silu(x, weight, bias, reverse)
    outputs = []
    for k, back in enumerate(reverse):
        u = _convolve(_channels_first(x, back), weight[k], None if bias is None else bias[k])
        outputs.append(_turn(u, back).transpose(1, 2).contiguous())
    return tuple(outputs)


def scan(
    u: Sequence[Tensor],
    dt: Sequence[Tensor],
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    z: Tensor | None,
    A_log: Sequence[Tensor],
    D: Sequence[Tensor] | None,
    dt_weight: Sequence[Tensor] | None,
    dt_bias: Sequence[Tensor] | None,
    *,
    reverse: Sequence[bool],
    softplus: bool = True,
    scale: float = 1.0,
    A_is_log: bool = True,
) -> tuple[Tensor, Tensor]:
    """`svp_peft.ops.reference.scan`: same arguments, same results; at most 256 states."""
    if u[0].numel() == 0:
        return reference.scan(
            u, dt, B, C, z, A_log, D, dt_weight, dt_bias,
            reverse=reverse, softplus=softplus, scale=scale, A_is_log=A_is_log,
        )  # fmt: skip
    dtype = u[0].dtype
    y = torch.zeros((), device=u[0].device)
    for k, back in enumerate(reverse):
        delta = dt[k] if dt_weight is None else F.linear(dt[k], dt_weight[k].to(dtype))
        y_k = _scan_direction(
            _channels_first(u[k], back),
            _channels_first(delta.to(dtype), back),
            _channels_first(B[k].to(dtype), back),
            _channels_first(C[k].to(dtype), back),
            None,
            _rates(A_log[k], A_is_log),
            None if D is None else D[k],
            None if dt_bias is None else dt_bias[k],
            softplus,
        )
        y = y + _turn(y_k, back).transpose(1, 2).float()
    out = y * scale
    if z is not None:
        out = out * F.silu(z.float())
    return out.to(dtype), y.to(dtype)


def mixer(hidden: Tensor, weights: MixerWeights, *, scale: float) -> Tensor:
    """`svp_peft.ops.reference.mixer`: same arguments, same results. Channels-first throughout."""
    if hidden.numel() == 0:
        return reference.mixer(hidden, weights, scale=scale)
    w, dtype = weights, hidden.dtype

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    x, z = linear(hidden, w.in_proj_weight, w.in_proj_bias).chunk(2, dim=-1)
    dt_rank, d_state = w.dt_weight[0].shape[1], w.A_log[0].shape[1]
    # per convolution, in the order of its scan: u and delta (batch, d_inner, L), B and C
    branches = []
    for k, back in enumerate(w.conv_reverse):
        bias = None if w.conv_bias is None else w.conv_bias[k]
        u = _convolve(_channels_first(x, back), w.conv_weight[k], bias)
        low = linear(u.transpose(1, 2), w.x_proj_weight[k])
        dt, B, C = low.split((dt_rank, d_state, d_state), dim=-1)
        delta = linear(dt, w.dt_weight[k])
        branches.append((u, *(_channels_first(t, False) for t in (delta, B, C))))
    total = torch.zeros((), device=hidden.device, dtype=dtype)
    for k, back in enumerate(w.scan_reverse):
        source = w.source_of_direction[k]
        # "v1" scans the one convolution in both directions
        turn = back != w.conv_reverse[source]
        u, delta, B, C = (_turn(t, turn).contiguous() for t in branches[source])
        gated = _scan_direction(
            u, delta, B, C, _channels_first(z, back),
            _rates(w.A_log[k], True), w.D[source], w.dt_bias[source], True,
        )  # fmt: skip
        total = total + _turn(gated, back)
    return linear((total * scale).transpose(1, 2), w.out_proj_weight, w.out_proj_bias)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of the causal convolution of x (batch, d_inner, L)."""
    taps = weight.reshape(weight.shape[0], -1).float()
    shift = None if bias is None else bias.float()
    return stock.causal_conv1d_fn()(x, taps, shift, activation="silu")  # type: ignore[no-any-return]


def _scan_direction(
    u: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
) -> Tensor:
    """One scan over (batch, d_inner, L) in the order of L."""
    D = None if D is None else D.float()
    bias = None if bias is None else bias.float()
    out: Tensor = stock.selective_scan_fn()(
        u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=softplus
    )
    return out


def _rates(A_log: Tensor, A_is_log: bool) -> Tensor:
    return -torch.exp(A_log.float()) if A_is_log else A_log.float()


def _channels_first(x: Tensor, back: bool) -> Tensor:
    """(batch, L, width) -> (batch, width, L), in the order of the scan."""
    return _turn(x.transpose(1, 2), back).contiguous()


def _turn(x: Tensor, back: bool) -> Tensor:
    """x with L, its last axis, in reverse where `back`."""
    return x.flip(-1) if back else x
