"""The selective scan on the GPU: which kernel, with which arguments."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from svp_peft.errors import InputError
from svp_peft.ops.casting import cast
from svp_peft.ops.cuda.kernels import (
    CPP_TYPE,
    Kernel,
    multiprocessors,
    shared_memory_limit,
)
from svp_peft.ops.cuda.layout import (
    copy_bytes,
    cpp_type,
    device_index,
    element_size,
    parameters,
    pointers,
    rows,
)

# struct ScanInputs of scan.cuh, padded to a multiple of 8 bytes
INPUTS_LAYOUT = "17Q8if4x"
_CHUNKS = 8
_CHUNK_CHANNELS = 8
_LARGEST_FOLDED_RANK = 64
# Warps per multiprocessor up to which one launch leaves it idle most of the time: measured, a token
# costs 2.7 times as much with 2 as with 35, and 1.3 times as much with 9. In pieces it costs 1.6
# times as much, by count of instructions.
_FEW_WARPS = 4
# of pieces: what is resident at once; a few more would take as long as twice as many
_MANY_WARPS = 16
_LONG = 512  # tokens from which pieces pay for a second launch
_SHORTEST_PIECE = 64


class Inputs(NamedTuple):
    """The scan's tensors as the kernels take them."""

    place: torch.device
    device: int  # its number
    dtype: torch.dtype
    batch: int
    length: int
    channels: int
    d_state: int
    rank: int  # dt_rank where dt_proj is left to the kernel, else 0
    directions: int
    values: tuple[float, ...]  # the fields of ScanInputs
    macros: tuple[tuple[str, object], ...]
    keep: tuple[object, ...]  # copies that must live until the launch

    @property
    def warps(self) -> int:
        """Warps of a kernel with one lane per channel."""
        return self.batch * self.directions * -(-self.channels // 32)


def gather(
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
    softplus: bool,
    scale: float,
    A_is_log: bool,
    fold: bool,
    extra: Sequence[tuple[int, int]] = (),
) -> Inputs:
    """Lay out the inputs of a scan.

    Args:
        fold: leave dt_proj to the kernel where it can do it; otherwise it is a matmul here.
        extra: addresses and row distances (in elements) of further (batch, L, d_inner) tensors that
            the kernel moves in tiles.
    """
    dtype = u[0].dtype
    batch, length, channels = u[0].shape
    d_state, directions = A_log[0].shape[1], len(reverse)
    if directions == 2 and reverse[0] == reverse[1]:
        raise InputError(
            f"reverse={tuple(reverse)}: the CUDA scan joins two directions only when they are "
            f"opposite. Call it once per direction and add the results."
        )
    rank = 0
    if dt_weight is not None:
        rank = dt_weight[0].shape[1]
        if not fold or dtype == torch.float32 or rank > _LARGEST_FOLDED_RANK:
            dt = [torch.matmul(d, cast(w, dtype).t()) for d, w in zip(dt, dt_weight, strict=True)]
            dt_weight, rank = None, 0
    A_log = parameters(A_log) or ()
    D, dt_weight, dt_bias = parameters(D), parameters(dt_weight), parameters(dt_bias)

    row_tensors: list[tuple[Sequence[Tensor], int]] = []
    for tensors in (u, dt, B, C):
        laid_out = [rows(x) for x in tensors]
        if len({row for _, row in laid_out}) > 1:
            laid_out = [(x.contiguous(), x.shape[2]) for x, _ in laid_out]
        row_tensors.append(([x for x, _ in laid_out], laid_out[0][1]))
    (u, u_row), (dt, dt_row), (B, b_row), (C, c_row) = row_tensors
    z_row = 0
    if z is not None:
        z, z_row = rows(z)
    u_at, dt_at, b_at, c_at = pointers(u), pointers(dt), pointers(B), pointers(C)
    z_at = 0 if z is None else z.data_ptr()

    size = element_size(dtype)
    tile = [*u_at, z_at, u_row * size, z_row * size, 32 * size]
    narrow = [*b_at, *c_at, b_row * size, c_row * size, d_state * size]
    for address, row in extra:
        tile += [address, row * size]
    if rank:
        narrow += [*dt_at, dt_row * size, rank * size]
    else:
        tile += [*dt_at, dt_row * size]
    copy_tile = copy_bytes(*tile) if channels % 32 == 0 else 0
    values = (
        *(*u_at, *dt_at, *b_at, *c_at, z_at),
        *(*pointers(A_log), *pointers(D), *pointers(dt_weight), *pointers(dt_bias)),
        *(batch, length, channels, u_row, dt_row, b_row, c_row, z_row, scale),
    )
    macros = (
        ("ACT", CPP_TYPE[dtype]),
        ("A_T", cpp_type(A_log)),
        ("D_T", cpp_type(D)),
        ("W_T", cpp_type(dt_weight)),
        ("BIAS_T", cpp_type(dt_bias)),
        # sizes without alignment share one kernel: they are rare and slow anyway
        ("D_INNER", channels if copy_tile == 16 else 0),
        ("D_STATE", d_state),
        ("DIRECTIONS", directions),
        ("REVERSED", bool(reverse[0])),
        ("RANK", rank),
        ("HAS_Z", z is not None),
        ("HAS_D", D is not None),
        ("HAS_BIAS", dt_bias is not None),
        ("SOFTPLUS", softplus),
        ("A_IS_LOG", A_is_log),
        ("COPY_TILE", copy_tile if copy_tile == 16 else 0),
        ("COPY_ROWS", copy_bytes(*narrow)),
    )
    index = device_index(u[0])
    return Inputs(
        u[0].device, index, dtype, batch, length, channels, d_state, rank, directions, values,
        macros, (u, dt, B, C, z, A_log, D, dt_weight, dt_bias),
    )  # fmt: skip


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
    softplus: bool,
    scale: float,
    save_y: bool,
    A_is_log: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Scan every direction, add, gate: see `svp_peft.ops.reference.scan` for the formula.

    Returns:
        `out` (batch, L, d_inner) in u's dtype, and the ungated sum `y` likewise if `save_y`.
    """
    given = gather(
        u, dt, B, C, z, A_log, D, dt_weight, dt_bias,
        reverse=reverse, softplus=softplus, scale=scale, A_is_log=A_is_log, fold=True,
    )  # fmt: skip
    out = u[0].new_empty(given.batch, given.length, given.channels)
    y = torch.empty_like(out) if save_y else None
    if out.numel() == 0:
        return out, y
    launch = forward_launch(given, save_y)
    launch(*given.values, out.data_ptr(), 0 if y is None else y.data_ptr())
    return out, y


def forward_launch(given: Inputs, save_y: bool) -> Callable[..., None]:
    """The launch that is best for these sizes; it takes the fields of ScanInputs, out and y."""
    return _chunked(given, save_y) or _in_pieces(given, save_y) or _streaming(given, save_y)


def _streaming(given: Inputs, save_y: bool) -> Callable[..., None]:
    kernel = _streaming_kernel(given.device, given.macros, save_y, 0)
    blocks = given.batch * -(-given.channels // 32)
    return functools.partial(kernel, (blocks, 1, 1))


def _in_pieces(given: Inputs, save_y: bool) -> Callable[..., None] | None:
    """Two launches over pieces of long sequences, where the images alone would not fill the GPU."""
    processors = multiprocessors(given.device)
    if given.warps > _FEW_WARPS * processors or given.length < _LONG:
        return None
    wanted = _MANY_WARPS * processors // given.warps
    tokens = max(_SHORTEST_PIECE, -(-given.length // wanted))
    tokens = -(-tokens // 8) * 8  # whole tiles
    pieces = -(-given.length // tokens)
    grid = (given.batch * pieces * -(-given.channels // 32), 1, 1)
    first, second = (
        _streaming_kernel(given.device, given.macros, part == 2 and save_y, part) for part in (1, 2)
    )
    floats = given.directions * given.batch * pieces * (given.d_state + 1) * given.channels
    place = given.place  # not `given`, which holds the activations: a launch may be kept

    def launch(*values: float) -> None:
        ends = torch.empty(floats, device=place, dtype=torch.float32)
        first(grid, *values, ends.data_ptr(), tokens)
        second(grid, *values, ends.data_ptr(), tokens)

    return launch


@functools.cache
def _streaming_kernel(
    device: int, macros: tuple[tuple[str, object], ...], save_y: bool, part: int
) -> Kernel:
    known = dict(macros)
    directions = int(str(known["DIRECTIONS"]))
    # 16 warps per multiprocessor at 128 registers are best for 16 states; more states need more
    blocks = 16 // directions if known["D_STATE"] in (8, 16) and known["ACT"] != "float" else 1
    unroll = 4 if known["D_STATE"] in (8, 16) else 1
    known |= {"PART": part, "SAVE_Y": save_y, "BLOCKS_PER_SM": blocks, "UNROLL": unroll}
    layout = INPUTS_LAYOUT + ("2QQi4x" if part else "2Q")
    return Kernel("scan_forward", "scan_forward", known, layout, device, threads=32 * directions)


def _chunked(given: Inputs, save_y: bool) -> Callable[..., None] | None:
    """The kernel for few images, where it applies: pieces of the sequence are scanned at once."""
    if given.warps > 2 * multiprocessors(given.device) or given.length < 4 * _CHUNKS:
        return None
    copy_rows = dict(given.macros)["COPY_ROWS"]
    if given.rank and copy_rows == 0:
        return None
    lane_states = given.d_state // 4
    floats = given.directions * (
        given.length * (2 * given.d_state + 3 * _CHUNK_CHANNELS) + _CHUNKS * 32 * (lane_states + 1)
    )
    if 4 * floats > shared_memory_limit(given.device):
        return None
    kernel = _chunked_kernel(given.device, given.macros, save_y, 4 * floats)
    blocks = given.batch * -(-given.channels // _CHUNK_CHANNELS)
    return functools.partial(kernel, (blocks, 1, 1))


@functools.cache
def _chunked_kernel(
    device: int, macros: tuple[tuple[str, object], ...], save_y: bool, shared: int
) -> Kernel:
    known = dict(macros) | {"SAVE_Y": save_y, "CHUNKS": _CHUNKS}
    # two blocks of 16 warps at 64 registers beat one at 98: 0.032 against 0.040 ms at batch 4
    known["BLOCKS_PER_SM"] = 2 if known["D_STATE"] in (8, 16) else 1
    return Kernel(
        "scan_forward_chunked",
        "scan_forward_chunked",
        known,
        INPUTS_LAYOUT + "2Q",
        device,
        threads=32 * int(str(known["DIRECTIONS"])) * _CHUNKS,
        shared=shared,
    )
