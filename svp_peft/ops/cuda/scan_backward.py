"""The gradients of the selective scan on the GPU: which kernels, with which arguments."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from svp_peft.ops.casting import cast
from svp_peft.ops.cuda.kernels import CPP_TYPE, Kernel
from svp_peft.ops.cuda.layout import pointers, rows
from svp_peft.ops.cuda.scan import INPUTS_LAYOUT, Inputs, gather, scan
from svp_peft.ops.types import ScanGrads, ScanNeeds

_Macros = tuple[tuple[str, object], ...]
_TILE = 8
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
    dtype, directions = u[0].dtype, len(reverse)
    batch, length, channels = u[0].shape
    need = need._replace(
        z=need.z and z is not None,
        D=need.D and D is not None,
        dt_bias=need.dt_bias and dt_bias is not None,
        dt_weight=need.dt_weight and dt_weight is not None,
    )
    parameters = (A_log, D, dt_weight, dt_bias)
    flags = {"reverse": reverse, "softplus": softplus, "scale": scale, "A_is_log": A_is_log}
    if need.z and y is None:
        _, y = scan(u, dt, B, C, z, *parameters, save_y=True, **flags)  # type: ignore[arg-type]
    grad_out = grad_out.contiguous()
    y = None if y is None or not need.z else y.contiguous()
    fast = _is_fast(u[0], A_log[0].shape[1])
    extra = [(grad_out.data_ptr(), channels)] + ([] if y is None else [(y.data_ptr(), channels)])
    if dz_out is not None:
        extra.append((dz_out.data_ptr(), rows(dz_out)[1]))
    given = gather(
        u,
        dt,
        B,
        C,
        z,
        *parameters,
        fold=fast,
        extra=extra,
        **flags,  # type: ignore[arg-type]
    )
    if dict(given.macros)["COPY_TILE"] != 16 and fast:
        fast = False
        given = gather(
            u,
            dt,
            B,
            C,
            z,
            *parameters,
            fold=False,
            extra=extra,
            **flags,  # type: ignore[arg-type]
        )

    def per_direction(wanted: bool, width: int) -> tuple[Tensor, ...] | None:
        if not wanted:
            return None
        return tuple(u[0].new_empty(batch, length, width) for _ in range(directions))

    du = per_direction(need.u, channels)
    ddelta = per_direction(need.dt or need.dt_weight, channels)
    dz, dz_row = None, 0
    if need.z:
        dz = dz_out if dz_out is not None else u[0].new_empty(batch, length, channels)
        written, dz_row = rows(dz)
        if written.data_ptr() != dz.data_ptr():
            raise ValueError(
                f"dz_out with strides {tuple(dz.stride())} cannot be written: its rows must be "
                f"equally spaced and its last dimension contiguous."
            )
    workers = _fast_warps(channels) if fast else 1
    parts = -(-channels // (32 * workers))
    empty = functools.partial(torch.empty, device=u[0].device, dtype=torch.float32)
    d_state = given.d_state
    partial = (parts, directions, batch, length, d_state)
    parts_B = empty(partial) if need.B else None
    parts_C = empty(partial) if need.C else None
    dA = empty(batch, directions, channels, d_state) if need.A else None
    dD = empty(batch, directions, channels) if need.D else None
    dbias = empty(batch, directions, channels) if need.dt_bias else None
    tiles = -(-length // _TILE)
    if fast:
        workspace = [empty(directions, batch, tiles * _TILE, channels, 2)]
        states = None
        if need.A or need.dt_bias:
            states = empty(directions, batch, tiles, d_state + 1, channels)
        workspace_at: tuple[int, ...] = (workspace[0].data_ptr(), _address(states))
        workspace += [] if states is None else [states]
    else:
        workspace = [empty(directions, batch, tiles, d_state, -(-channels // 32) * 32)]
        workspace_at = (workspace[0].data_ptr(),)
    if u[0].numel():
        _launch(
            given, need, fast, workers, (parts * directions * batch, 1, 1),
            (grad_out.data_ptr(), _address(y)),
            (*pointers(du), *pointers(ddelta), _address(dz)),
            (_address(parts_B), _address(parts_C), *workspace_at),
            (_address(dA), _address(dD), _address(dbias), dz_row),
        )  # fmt: skip
    del workspace

    sections = [None] * directions if dx_dbl_out is None else list(dx_dbl_out)
    rank = 0 if dt_weight is None else dt_weight[0].shape[1]

    def section(wanted: bool, begin: int, width: int) -> tuple[Tensor, ...] | None:
        if not wanted:
            return None
        if dx_dbl_out is None:
            return per_direction(True, width)
        return tuple(to[..., begin : begin + width] for to in sections if to is not None)

    dB, dC = section(need.B, rank, d_state), section(need.C, rank + d_state, d_state)
    _reduce(given, parts_B, parts_C, dB, dC)
    ddt, ddt_weight = ddelta, None
    if dt_weight is not None and ddelta is not None:
        flat = [d.view(-1, channels) for d in ddelta]
        ddt = section(need.dt, 0, rank)
        if ddt is not None:
            for k, to in enumerate(ddt):
                weight = cast(dt_weight[k], dtype)
                if to.is_contiguous() or batch == 1 or to.stride(0) == length * to.stride(1):
                    target = to.as_strided((batch * length, rank), (rows(to)[1], 1))
                    torch.mm(flat[k], weight, out=target)
                else:
                    to.copy_((flat[k] @ weight).view_as(to))
        if need.dt_weight:
            ddt_weight = tuple(
                torch.mm(flat[k].t(), dt[k].reshape(-1, rank)).float() for k in range(directions)
            )
    return ScanGrads(
        du=du,
        ddt=ddt if need.dt else None,
        dB=dB,
        dC=dC,
        dz=dz,
        dA=_over_images(dA),
        dD=_over_images(dD),
        ddt_weight=ddt_weight,
        ddt_bias=_over_images(dbias),
    )


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
    given: Inputs,
    need: ScanNeeds,
    fast: bool,
    workers: int,
    grid: tuple[int, int, int],
    *groups: tuple[float, ...],
) -> None:
    values = [value for group in groups for value in group]
    needs = need._replace(dt=need.dt or need.dt_weight)
    build = _fast_kernel if fast else _exact_kernel
    kernel = build(given.device, given.macros, needs, workers)
    kernel(grid, *given.values, *values)


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
    # 16 warps per multiprocessor at 128 registers; the sums for dA take 16 registers more
    warps = 12
    known |= {"WARPS": workers, "BLOCKS_PER_SM": warps // workers, "UNROLL": 4, "DIRECT": 1}
    d_state, rank = int(str(known["D_STATE"])), int(str(known["RANK"]))
    tile = _TILE * 32 * 2
    padded = -(-rank // 16) * 16
    first = (tile if need.z else 16) + (_TILE * (padded + 8) * 2 if rank else tile)
    stage = 2 * tile + (tile if known["HAS_Z"] else 16) + max(first, _TILE * 32 * 8)
    projection = 2 * padded // 16 * 32 * 16 + 32 * 4 if rank else 0
    warp = 2 * stage + projection + _TILE * 33 * 4
    block = 4 * _TILE * d_state * 2 + 2 * _TILE * d_state * 4
    shared = block + workers * (warp + _TILE * 33 * 16)
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
