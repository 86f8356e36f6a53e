"""The gradients of the selective scan on the GPU: which kernels, with which arguments."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svp_peft.ops.casting import cast
from svp_peft.ops.cuda.kernels import CPP_TYPE, Kernel
from svp_peft.ops.cuda.layout import pointers, rows
from svp_peft.ops.cuda.scan import INPUTS_LAYOUT, Inputs, gather, scan
from svp_peft.ops.types import ScanGrads, ScanNeeds

_Macros = tuple[tuple[str, object], ...]
_TILE = 8
_STASHED = 3  # floats that the first sweep leaves per step and channel
_EXACT_LAYOUT = INPUTS_LAYOUT + "2Q5Q2QQ3Qi4x"
_FAST_LAYOUT = INPUTS_LAYOUT + "2Q5Q2Q2Q3Qi4x"


def scan_backward(
    grad_out: Tensor,
    u: Sequence[Tensor],
    dt: Sequence[Tensor],
    B: Sequence[Tensor],
    C: Sequence[Tensor],
    z: Tensor | None,
    y: Tensor | None,
    A_log: Sequence[Tensor],
    D: Sequence[Tensor] | None,
    dt_weight: Sequence[Tensor] | None,
    dt_bias: Sequence[Tensor] | None,
    *,
    reverse: Sequence[bool],
    softplus: bool,
    scale: float,
    A_is_log: bool = True,
    dz_out: Tensor | None = None,
    dx_dbl_out: Sequence[Tensor] | None = None,
    need: ScanNeeds,
) -> ScanGrads:
    """Gradients of `scan`; only those that `need` names are computed.

    Args:
        grad_out: gradient of `out`, (batch, L, d_inner).
        y: the ungated sum that `scan` saved, or None: computed again where dz is wanted.
        dz_out: (batch, L, d_inner) view to write dz into.
        dx_dbl_out: per direction, (batch, L, dt_rank + 2 d_state): ddt, dB and dC are written to
            its slices and returned as views of it. Needs `dt_weight`.
    """
    need = need._replace(
        z=need.z and z is not None,
        D=need.D and D is not None,
        dt_bias=need.dt_bias and dt_bias is not None,
        dt_weight=need.dt_weight and dt_weight is not None,
    )
    inputs = (u, dt, B, C, z, A_log, D, dt_weight, dt_bias)
    flags: dict[str, Any] = {
        "reverse": reverse,
        "softplus": softplus,
        "scale": scale,
        "A_is_log": A_is_log,
    }
    if need.z and y is None:
        _, y = scan(*inputs, save_y=True, **flags)
    grad_out = grad_out.contiguous()
    y = None if y is None or not need.z else y.contiguous()
    extra = [(x.data_ptr(), x.shape[2]) for x in (grad_out, y) if x is not None]
    if dz_out is not None:
        extra.append((dz_out.data_ptr(), rows(dz_out)[1]))
    fast = _is_fast(u[0], A_log[0].shape[1])
    given = gather(*inputs, fold=fast, extra=extra, **flags)
    if fast and dict(given.macros)["COPY_TILE"] != 16:
        fast = False
        given = gather(*inputs, fold=False, extra=extra, **flags)

    buffers = _Buffers(given, need, fast, u[0], dz_out)
    if u[0].numel():
        _launch(given, need, fast, grad_out, y, buffers)
    rank = 0 if dt_weight is None else dt_weight[0].shape[1]

    def section(wanted: bool, begin: int, width: int) -> tuple[Tensor, ...] | None:
        """Where a gradient of dt, B or C goes: a slice of dx_dbl_out, or a tensor of its own."""
        if not wanted:
            return None
        if dx_dbl_out is None:
            return buffers.per_direction(width)
        return tuple(to[..., begin : begin + width] for to in dx_dbl_out)

    dB, dC = (
        section(need.B, rank, given.d_state),
        section(need.C, rank + given.d_state, given.d_state),
    )
    _reduce(given, buffers.parts_B, buffers.parts_C, dB, dC)
    ddt, ddt_weight = buffers.ddelta, None
    if dt_weight is not None and ddt is not None:
        low = section(need.dt, 0, rank)
        for k, gradient in enumerate(ddt):
            if low is not None:
                _product_into(low[k], gradient, cast(dt_weight[k], u[0].dtype))
        if need.dt_weight:
            ddt_weight = tuple(
                torch.mm(g.flatten(0, 1).t(), d.reshape(-1, rank)).float()
                for g, d in zip(ddt, dt, strict=True)
            )
        ddt = low
    return ScanGrads(
        du=buffers.du,
        ddt=ddt if need.dt else None,
        dB=dB,
        dC=dC,
        dz=buffers.dz,
        dA=_over_images(buffers.dA),
        dD=_over_images(buffers.dD),
        ddt_weight=ddt_weight,
        ddt_bias=_over_images(buffers.dbias),
    )


class _Buffers:
    """What the kernels write: gradients, partial sums, and the workspace of the two sweeps."""

    def __init__(
        self, given: Inputs, need: ScanNeeds, fast: bool, like: Tensor, dz_out: Tensor | None
    ) -> None:
        batch, length, channels = given.batch, given.length, given.channels
        self._given, self._like = given, like
        self.du = self.per_direction(channels) if need.u else None
        self.ddelta = self.per_direction(channels) if need.dt or need.dt_weight else None
        self.dz, self.dz_row = None, 0
        if need.z:
            self.dz = dz_out if dz_out is not None else like.new_empty(batch, length, channels)
            written, self.dz_row = rows(self.dz)
            if written.data_ptr() != self.dz.data_ptr():
                raise ValueError(
                    f"dz_out with strides {tuple(self.dz.stride())} cannot be written: its rows "
                    f"must be equally spaced and its last dimension contiguous."
                )
        self.workers = _fast_warps(channels) if fast else 1
        self.parts = -(-channels // (32 * self.workers))
        directions, d_state = given.directions, given.d_state

        def floats(wanted: bool, *shape: int) -> Tensor | None:
            if not wanted:
                return None
            return torch.empty(shape, device=like.device, dtype=torch.float32)

        partial = (self.parts, directions, batch, length, d_state)
        self.parts_B, self.parts_C = floats(need.B, *partial), floats(need.C, *partial)
        self.dA = floats(need.A, batch, directions, channels, d_state)
        self.dD = floats(need.D, batch, directions, channels)
        self.dbias = floats(need.dt_bias, batch, directions, channels)
        tiles = -(-length // _TILE)
        if fast:
            stash = floats(True, directions, batch, tiles * _TILE, channels, _STASHED)
            keeps = need.A or need.dt_bias
            states = floats(keeps, directions, batch, tiles, d_state + 1, channels)
            self.workspace: tuple[Tensor | None, ...] = (stash, states)
        else:
            padded = -(-channels // 32) * 32
            self.workspace = (floats(True, directions, batch, tiles, d_state, padded),)

    def per_direction(self, width: int) -> tuple[Tensor, ...]:
        """New tensors (batch, L, width) in the inputs' dtype."""
        given = self._given
        shape = (given.batch, given.length, width)
        return tuple(self._like.new_empty(shape) for _ in range(given.directions))


def _product_into(to: Tensor, gradient: Tensor, weight: Tensor) -> None:
    """to = gradient @ weight for (batch, L, ...) tensors, without a copy where `to` allows it."""
    batch, length, width = to.shape
    if to.is_contiguous() or batch == 1 or to.stride(0) == length * to.stride(1):
        target = to.as_strided((batch * length, width), (rows(to)[1], 1))
        torch.mm(gradient.flatten(0, 1), weight, out=target)
    else:
        to.copy_(gradient @ weight)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _over_images(x: Tensor | None) -> tuple[Tensor, ...] | None:
    """(batch, K, ...) partial sums -> per direction."""
    return None if x is None else tuple(x.sum(0).unbind(0))


def _is_fast(u: Tensor, d_state: int) -> bool:
    """Whether the two-sweep kernel may run: its telescoped sums are for 16-bit results only."""
    return u.dtype != torch.float32 and d_state in (8, 16) and u.shape[2] % 32 == 0


def _fast_warps(channels: int) -> int:
    """Warps of a block: as many as divide the channels, since fewer partial sums then remain."""
    return next(w for w in (4, 2, 1) if channels % (32 * w) == 0)


def _launch(
    given: Inputs, need: ScanNeeds, fast: bool, grad_out: Tensor, y: Tensor | None, to: _Buffers
) -> None:
    needs = need._replace(dt=need.dt or need.dt_weight)
    build = _fast_kernel if fast else _exact_kernel
    kernel = build(given.device, given.macros, needs, to.workers)
    kernel(
        (to.parts * given.directions * given.batch, 1, 1),
        *given.values,
        *(grad_out.data_ptr(), _address(y)),
        *(*pointers(to.du), *pointers(to.ddelta), _address(to.dz)),
        *(_address(to.parts_B), _address(to.parts_C), *map(_address, to.workspace)),
        *(_address(to.dA), _address(to.dD), _address(to.dbias), to.dz_row),
    )


def _need_macros(need: ScanNeeds) -> dict[str, object]:
    return {
        "NEED_U": need.u,
        "NEED_DT": need.dt,
        "NEED_B": need.B,
        "NEED_C": need.C,
        "NEED_Z": need.z,
        "NEED_A": need.A,
        "NEED_D": need.D,
        "NEED_BIAS": need.dt_bias,
    }


@functools.cache
def _exact_kernel(device: int, macros: _Macros, need: ScanNeeds, workers: int) -> Kernel:
    known = dict(macros) | _need_macros(need)
    d_state = int(str(known["D_STATE"]))
    size = 4 if known["ACT"] == "float" else 2
    group = min(d_state, 16)
    warp = (
        2 * 2 * _TILE * group * size  # rows of B and C, twice
        + 2 * _TILE * group * 4  # the same as float
        + _TILE * max(group, 8) * 32 * 4  # states
        + 2 * _TILE * 32 * 4
    )
    shared = 2 * 5 * _TILE * 32 * size + d_state // group * warp
    known["SHARED_BYTES"] = shared
    return Kernel(
        "scan_backward",
        "scan_backward",
        known,
        _EXACT_LAYOUT,
        device,
        threads=32 * (d_state // group),
        shared=shared,
    )


@functools.cache
def _fast_kernel(device: int, macros: _Macros, need: ScanNeeds, workers: int) -> Kernel:
    known = dict(macros) | _need_macros(need)
    # 12 warps per multiprocessor at 168 registers; measured faster than 16 at 128, which spill
    known |= {"WARPS": workers, "BLOCKS_PER_SM": 12 // workers, "UNROLL": 2}
    d_state, rank = int(str(known["D_STATE"])), int(str(known["RANK"]))
    tile = _TILE * 32 * 2
    padded, plane = -(-rank // 16) * 16, _TILE * 36 * 4
    stage = 2 * tile + (tile if known["HAS_Z"] else 16) + (tile if need.z else 16)
    stage += _TILE * (padded + 8) * 2 if rank else tile
    projection = 2 * padded // 16 * 32 * 16 + 32 * 4 if rank else 0
    first = 2 * stage + projection + 2 * plane
    second = 2 * (tile + _TILE * 32 * 12) + plane
    sums = _TILE * 32 * 16
    shared = workers * (max(first, second) + sums) + 2 * _TILE * d_state * (2 + 4)
    known["SHARED_BYTES"] = shared
    return Kernel(
        "scan_backward_fast",
        "scan_backward_fast",
        known,
        _FAST_LAYOUT,
        device,
        threads=32 * workers,
        shared=shared,
    )


def _reduce(
    given: Inputs,
    parts_B: Tensor | None,
    parts_C: Tensor | None,
    dB: tuple[Tensor, ...] | None,
    dC: tuple[Tensor, ...] | None,
) -> None:
    """Add the partial sums of dB and dC in a fixed order."""
    some = parts_B if parts_B is not None else parts_C
    if some is None or some.numel() == 0:
        return
    kernel = _reduce_kernel(
        given.device, given.dtype, given.d_state, given.directions, dB is not None, dC is not None
    )
    b_row = 0 if dB is None else rows(dB[0])[1]
    c_row = 0 if dC is None else rows(dC[0])[1]
    tokens = given.batch * given.length
    threads = given.directions * tokens * given.d_state // 4
    kernel(
        (-(-threads // 256), 1, 1),
        _address(parts_B), _address(parts_C), *pointers(dB), *pointers(dC),
        some.shape[0], tokens, b_row, c_row,
    )  # fmt: skip


@functools.cache
def _reduce_kernel(
    device: int, dtype: torch.dtype, d_state: int, directions: int, need_B: bool, need_C: bool
) -> Kernel:
    macros = {
        "ACT": CPP_TYPE[dtype],
        "D_STATE": d_state,
        "DIRECTIONS": directions,
        "NEED_B": need_B,
        "NEED_C": need_C,
    }
    return Kernel("reduce", "reduce_BC", macros, "2Q2Q2Q4i", device, threads=256)
