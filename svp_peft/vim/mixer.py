"""The mixer of a Vim block: a Mamba that scans the tokens in one or both directions.

Shapes in this file.

batch    images in the batch
L        tokens, class token included
d_model  token width
d_inner  width inside the mixer, expand * d_model
d_state  SSM state size per channel
dt_rank  rank of the time-step projection
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svp_peft import ops
from svp_peft.errors import InputError
from svp_peft.vim import arguments
from svp_peft.vim.bare import FrozenWeights, every_module_is_hooked, is_bare

BIMAMBA_TYPES = ("none", "v1", "v2")
_CONVOLUTIONS = ("conv1d", "conv1d_b")


class VimMixer(nn.Module):
    """Bidirectional Mamba with the parameter names of hustvl/Vim's fork.

        x, z     = split(in_proj(hidden))
        u_k      = SiLU(conv_k(x)),  dt, B, C = split(x_proj_k(u_k))           k = direction
        out      = out_proj(scale * (sum_k scan_k(u_k, dt_proj_k(dt), B, C)) * SiLU(z))

    One direction for bimamba_type "none". "v1" adds a backward scan that has its own A only, "v2"
    one with weights of its own (`*_b`). `scale` is 0.5 for "v2" with `if_divide_out`, else 1: the
    flag acts on "v2" alone, as in the fork.

    The whole mixer is one fused op that reads the weights of its submodules. A submodule that is
    wrapped (a forward hook, a parametrisation, a quantised weight, a LoRA layer in its place) is
    called instead, and the mixer is then composed of smaller ops: nothing is ever bypassed.

    Source: hustvl/Vim, mamba-1p1p1/mamba_ssm/modules/mamba_simple.py. Its slow path loses the
    backward direction and the division; this class has no such path.
    """

    gamma: nn.Parameter
    A_b_log: nn.Parameter
    D_b: nn.Parameter
    conv1d_b: nn.Conv1d
    x_proj_b: nn.Linear
    dt_proj_b: nn.Linear

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        if_devide_out: bool | None = None,
    ) -> None:
        """
        Args:
            d_model, d_state, expand, dt_rank: sizes; dt_rank "auto" is ceil(d_model / 16).
            d_conv: taps of the depthwise convolution.
            dt_min, dt_max, dt_init, dt_scale, dt_init_floor: initialisation of the time step.
            conv_bias, bias: biases of the convolutions and of in_proj and out_proj.
            use_fast_path: accepted for the fork's sake; the result does not depend on it.
            layer_idx: position of the block in the stack.
            bimamba_type: "none", "v1" or "v2".
            if_divide_out: halve the sum of the two directions of "v2". Older forks spell it
                if_devide_out.
            init_layer_scale: if given, the output is multiplied by a learned `gamma` (d_model,)
                that starts at this value.

        Raises:
            InputError: an unknown bimamba_type or dt_init, or a size or number that cannot work.
        """
        super().__init__()
        meaning = (
            "a mixer scans forwards ('none') or in both directions with shared ('v1') or own "
            "('v2') weights"
        )
        arguments.check_choice("bimamba_type", bimamba_type, BIMAMBA_TYPES, meaning)
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        arguments.check_counts(1, d_model=d_model, d_state=d_state, d_conv=d_conv, dt_rank=rank)
        arguments.check_numbers(1 / d_model, math.inf, expand=expand)
        arguments.check_flags(conv_bias=conv_bias, bias=bias)
        if init_layer_scale is not None:
            arguments.check_numbers(-math.inf, math.inf, init_layer_scale=init_layer_scale)
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = int(rank)
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        self.bimamba_type = bimamba_type
        self.if_divide_out = if_divide_out if if_devide_out is None else if_devide_out
        self.init_layer_scale = init_layer_scale
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        # A and D accumulate over all tokens: never below single precision
        exact = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        exact_factory: dict[str, Any] = {"device": device, "dtype": exact}

        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), float(init_layer_scale), **factory))
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.conv1d = self._convolution(conv_bias, factory)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **factory)
        self._init_dt(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        self.A_log = self._state_matrix(exact_factory)
        self.D = self._skip(exact_factory)
        if bimamba_type != "none":
            self.A_b_log = self._state_matrix(exact_factory)
        if bimamba_type == "v2":
            self.conv1d_b = self._convolution(conv_bias, factory)
            self.x_proj_b = nn.Linear(
                self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory
            )
            self.dt_proj_b = nn.Linear(self.dt_rank, self.d_inner, bias=True, **factory)
            self.D_b = self._skip(exact_factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        self._frozen = FrozenWeights()

    def _convolution(self, bias: bool, factory: dict[str, Any]) -> nn.Conv1d:
        return nn.Conv1d(
            self.d_inner,
            self.d_inner,
            kernel_size=self.d_conv,
            groups=self.d_inner,
            padding=self.d_conv - 1,
            bias=bias,
            **factory,
        )

    def _state_matrix(self, factory: dict[str, Any]) -> nn.Parameter:
        """log(1..d_state) in every channel: the real S4D initialisation."""
        row = torch.arange(1, self.d_state + 1, **factory).log()
        return _undecayed(row.repeat(self.d_inner, 1))

    def _skip(self, factory: dict[str, Any]) -> nn.Parameter:
        return _undecayed(torch.ones(self.d_inner, **factory))

    @torch.no_grad()
    def _init_dt(self, low: float, high: float, kind: str, scale: float, floor: float) -> None:
        """Time steps log-uniform in [low, high] after the softplus.

        Only the forward direction: the fork leaves `dt_proj_b` at PyTorch's default.
        """
        bound = self.dt_rank**-0.5 * scale
        if kind == "random":
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        elif kind == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            raise InputError(
                f"dt_init={kind!r} is unknown: the time-step projection starts 'random' or "
                f"'constant'. Use one of these two."
            )
        bias = self.dt_proj.bias
        log_dt = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(low), math.log(high))
        dt = log_dt.exp().clamp_(min=floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        # the stack sets the biases of its Linear layers to zero, but not this one
        bias._no_reinit = True  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, inference_params: object = None) -> Tensor:
        """Mix the tokens.

        Args:
            hidden_states: normalised tokens, float (batch, L, d_model).
            inference_params: must be None; it is here because the fork's signature has it.

        Returns:
            (batch, L, d_model), in the autocast dtype or hidden_states' own.

        Raises:
            InputError: inference_params is given. Decoding token by token has no meaning for a
                model that scans the image from both ends.
        """
        if inference_params is not None:
            raise InputError(
                "inference_params is given, but an image is scanned as a whole and there is no "
                "token-by-token decoding. Call the model without inference_params."
            )
        # a compiler cannot ask for addresses, and converts constants itself
        cache = None if torch.compiler.is_compiling() else self._frozen
        weights = None if cache is None else cache.of(self)
        if weights is None and self._is_bare():
            weights = self._weights()
            if cache is not None and not self._remember(weights):
                cache = None
        if weights is None:
            out = self._composed(hidden_states)
        else:
            out = ops.mixer(hidden_states, weights, scale=self._scale, cache=cache)
        return out if self.init_layer_scale is None else out * self.gamma

    def frozen_weights(self) -> ops.MixerWeights | None:
        """What the fused op reads, where all of it is frozen and no submodule is wrapped."""
        weights = self._frozen.of(self)
        if weights is None and not self.A_log.requires_grad and self._is_bare():
            weights = self._weights()
            if not self._remember(weights):
                return None
        return weights

    @property
    def _scale(self) -> float:
        return 0.5 if self.if_divide_out and self.bimamba_type == "v2" else 1.0

    def _is_bare(self) -> bool:
        """Whether the fused op may read every submodule's weights."""
        return not every_module_is_hooked() and all(
            is_bare(self.get_submodule(name), nn.Conv1d if name in _CONVOLUTIONS else nn.Linear)
            for name in self._parts()
        )

    def _parts(self) -> tuple[str, ...]:
        """Names of the submodules, convolutions first."""
        parts = ("conv1d", "in_proj", "x_proj", "dt_proj", "out_proj")
        if self.bimamba_type != "v2":
            return parts
        return ("conv1d", "conv1d_b", *parts[1:], "x_proj_b", "dt_proj_b")

    def _weights(self) -> ops.MixerWeights:
        """The weights as the op takes them."""
        convs, x_projs, dt_projs, skips = self._branches()
        return ops.MixerWeights(
            in_proj_weight=self.in_proj.weight,
            in_proj_bias=self.in_proj.bias,
            conv_weight=tuple(conv.weight.squeeze(1) for conv in convs),
            conv_bias=_biases(convs),
            x_proj_weight=tuple(x_proj.weight for x_proj in x_projs),
            dt_weight=tuple(dt_proj.weight for dt_proj in dt_projs),
            dt_bias=tuple(dt_proj.bias for dt_proj in dt_projs),
            A_log=self._state_matrices(),
            D=skips,
            out_proj_weight=self.out_proj.weight,
            out_proj_bias=self.out_proj.bias,
        )

    def _remember(self, weights: ops.MixerWeights) -> bool:
        """Keep `weights` for the next calls, if all of them are frozen."""
        fields = (f if isinstance(f, tuple) else (f,) for f in weights)
        if any(t is not None and t.requires_grad for field in fields for t in field):
            return False
        # copies made by nn.DataParallel live for one call and share this object
        if getattr(self, "_is_replica", False):
            return False
        own = [n for n in ("A_log", "A_b_log", "D", "D_b") if n in self._parameters]
        self._frozen.fill(self, weights, self._parts(), own)
        return True

    def train(self, mode: bool = True) -> VimMixer:
        # older code writes to weights through `.data`, which no version tells; between that and
        # the next use there is nearly always a change of mode
        if mode != self.training and self._frozen.prepared is not None:
            self._frozen.prepared.doubt()
        return super().train(mode)  # type: ignore[return-value]

    def _apply(self, fn: Any, recurse: bool = True) -> VimMixer:
        # to(), half() and their like give the parameters other data
        self._frozen = FrozenWeights()
        return super()._apply(fn, recurse)  # type: ignore[return-value]

    def _branches(
        self,
    ) -> tuple[
        tuple[nn.Conv1d, ...], tuple[nn.Linear, ...], tuple[nn.Linear, ...], tuple[Tensor, ...]
    ]:
        """Convolutions, x_proj, dt_proj and D: of one branch, or of two for "v2"."""
        if self.bimamba_type != "v2":
            return (self.conv1d,), (self.x_proj,), (self.dt_proj,), (self.D,)
        return (
            (self.conv1d, self.conv1d_b),
            (self.x_proj, self.x_proj_b),
            (self.dt_proj, self.dt_proj_b),
            (self.D, self.D_b),
        )

    def _state_matrices(self) -> tuple[Tensor, ...]:
        return (self.A_log,) if self.bimamba_type == "none" else (self.A_log, self.A_b_log)

    def _composed(self, hidden: Tensor) -> Tensor:
        """The same formula with every projection called as a module."""
        convs, x_projs, dt_projs, skips = self._branches()
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        dtype = x.dtype
        # as in the fused op: a CPU gains nothing from half precision in a scan
        working = torch.float32 if x.device.type == "cpu" and dtype.itemsize == 2 else dtype
        u = self._convolve(x, convs, working)
        low = [
            x_proj(u_k.to(dtype)).to(working).split((self.dt_rank, self.d_state, self.d_state), -1)
            for u_k, x_proj in zip(u, x_projs, strict=True)
        ]
        # a bare dt_proj stays inside the scan, which keeps the time step in single precision
        inside = not every_module_is_hooked() and all(
            is_bare(dt_proj, nn.Linear) for dt_proj in dt_projs
        )
        dt = [
            dt_k if inside else dt_proj(dt_k.to(dtype)).to(working)
            for (dt_k, _, _), dt_proj in zip(low, dt_projs, strict=True)
        ]
        A_log = self._state_matrices()
        pick = [min(k, len(convs) - 1) for k in range(len(A_log))]
        gated, _ = ops.scan(
            [u[k] for k in pick],
            [dt[k] for k in pick],
            [low[k][1] for k in pick],
            [low[k][2] for k in pick],
            z.to(working),
            A_log,
            [skips[k] for k in pick],
            [dt_projs[k].weight for k in pick] if inside else None,
            [dt_projs[k].bias for k in pick] if inside else None,
            reverse=(False, True)[: len(A_log)],
            softplus=True,
            scale=self._scale,
        )
        return self.out_proj(gated.to(dtype))

    def _convolve(
        self, x: Tensor, convs: tuple[nn.Conv1d, ...], working: torch.dtype
    ) -> list[Tensor]:
        """SiLU(conv(x)) per branch, in `working`; the second one looks at the tokens after t."""
        reverse = (False, True)[: len(convs)]
        if not every_module_is_hooked() and all(is_bare(conv, nn.Conv1d) for conv in convs):
            taps = [conv.weight.squeeze(1) for conv in convs]
            return list(ops.conv_silu(x.to(working), taps, _biases(convs), reverse))
        length = x.shape[1]
        branches = []
        for conv, backwards in zip(convs, reverse, strict=True):
            u = x.flip(1) if backwards else x
            u = F.silu(conv(u.transpose(1, 2))[..., :length]).transpose(1, 2)
            branches.append((u.flip(1) if backwards else u).to(working).contiguous())
        return branches

    def extra_repr(self) -> str:
        return f"bimamba_type={self.bimamba_type!r}, if_divide_out={self.if_divide_out}"


def _biases(convs: tuple[nn.Conv1d, ...]) -> tuple[Tensor, ...] | None:
    biases = tuple(conv.bias for conv in convs if conv.bias is not None)
    return biases or None


def _undecayed(value: Tensor) -> nn.Parameter:
    """A parameter that optimisers should not decay, marked as the fork marks it."""
    parameter = nn.Parameter(value)
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter
