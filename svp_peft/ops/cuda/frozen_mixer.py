"""The mixer of a frozen block with everything decided beforehand.

What a step at batch 8 costs is the host, not the GPU: choosing kernels, laying out arguments and
checking shapes takes longer than the kernels run. A `FrozenMixer` does that once for a block and
once for a shape. What is left per call is a dozen launches:

    forward    in_proj, conv, x_proj of both directions in one product, scan, out_proj
    backward   out_proj, scan, its sums, dt_proj, x_proj and conv in one kernel, in_proj

The arithmetic is that of `svp_peft.ops.mixer_passes` with the same kernels; only the gradient of
the input exists here. It serves bfloat16 and float16, one convolution per scan ("none" and "v2")
and sizes that the tensor-core scan takes; anything else goes the general way.
"""

from typing import Any

import torch
from torch import Tensor

from svp_peft.ops.casting import without_autocast
from svp_peft.ops.cuda.conv import _grid, _kernel_for
from svp_peft.ops.cuda.conv_projected import projected_launch, supports
from svp_peft.ops.cuda.layout import device_index, parameters, pointers
from svp_peft.ops.cuda.scan import forward_launch, gather
from svp_peft.ops.cuda.scan_backward import (
    _STASHED,
    _TILE,
    _fast_kernel,
    _fast_warps,
    _reduce_kernel,
)
from svp_peft.ops.derivatives import refuse_second
from svp_peft.ops.types import MixerWeights, ScanNeeds

_HALF = (torch.bfloat16, torch.float16)
_NEED = ScanNeeds()  # of the activations, none of the weights
_FOLD = True  # the gradient through x_proj inside the convolution's kernel, where that takes it


def frozen_mixer(weights: MixerWeights, dtype: torch.dtype, scale: float) -> "FrozenMixer | None":
    """A `FrozenMixer` for these weights, or None where the general way has to be taken."""
    channels, rank = weights.dt_weight[0].shape
    state = weights.A_log[0].shape[1]
    serves = (
        dtype in _HALF
        and len(weights.conv_weight) == len(weights.A_log)
        and state in (8, 16)
        and channels % 32 == 0
        and 0 < rank <= 64
    )
    # copies made while a graph is captured would hold nothing until it is replayed
    if not serves or torch.cuda.is_current_stream_capturing():
        return None
    return FrozenMixer(weights, dtype, scale)


class FrozenMixer:
    """Half-precision copies of one block's weights, and its launches for each shape seen."""

    def __init__(self, weights: MixerWeights, dtype: torch.dtype, scale: float) -> None:
        self.weights, self.dtype, self.scale = weights, dtype, scale
        self.directions = len(weights.A_log)
        self.channels, self._given_rank = weights.dt_weight[0].shape
        self.d_state = weights.A_log[0].shape[1]
        # the scan copies 16 bytes at once: the parts of a row of x_dbl start and end on them
        self.rank = -(-self._given_rank // 8) * 8
        fields = [f if isinstance(f, tuple) else (f,) for f in weights]
        self._tensors = tuple(t for field in fields for t in field if t is not None)
        self._addresses = tuple(t.data_ptr() for t in self._tensors)
        self._versions: tuple[int, ...] = ()
        self._copies: list[Tensor] = []
        self._shapes: dict[tuple[int, int], _Shape] = {}
        self._copy()

    def is_for(self, dtype: torch.dtype, scale: float) -> bool:
        """Whether this computes in `dtype`; renews the copies where a weight was written to."""
        if dtype != self.dtype or scale != self.scale:
            return False
        # sharded models free and reallocate their weights between two calls
        if tuple(t.data_ptr() for t in self._tensors) != self._addresses:
            return False
        if tuple(t._version for t in self._tensors) != self._versions:
            self._copy()
        return True

    def doubt(self) -> None:
        """Convert again at the next call: a weight may have changed without its version."""
        self._versions = ()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _copy(self) -> None:
        """Fill the copies; in place if they exist, for the sake of captured graphs."""
        w, dtype = self.weights, self.dtype
        copies: list[Tensor] = [
            w.in_proj_weight.to(dtype),
            w.out_proj_weight.to(dtype),
            torch.stack([self._padded(x, 0).to(dtype) for x in w.x_proj_weight]),
            torch.stack([self._padded(x, 1).to(dtype) for x in w.dt_weight]),
            torch.stack([self._padded(x, 1) for x in w.dt_weight]),
        ]
        copies += [b.to(dtype) for b in (w.in_proj_bias, w.out_proj_bias) if b is not None]
        if self._copies:
            for old, new in zip(self._copies, copies, strict=True):
                old.copy_(new)
        else:
            self._copies = copies
        self.in_proj, self.out_proj, self.x_proj, self.dt_proj, dt_weight, *biases = self._copies
        self.dt_weight = w.dt_weight if self.rank == self._given_rank else tuple(dt_weight)
        pending = iter(biases)
        self.in_bias = next(pending) if w.in_proj_bias is not None else None
        self.out_bias = next(pending) if w.out_proj_bias is not None else None
        self.in_proj_t, self.out_proj_t = self.in_proj.t(), self.out_proj.t()
        self.x_proj_t = self.x_proj.transpose(1, 2)
        self._versions = tuple(t._version for t in self._tensors)

    def _padded(self, x: Tensor, axis: int) -> Tensor:
        """x with zeros after the first dt_rank places of an axis, up to `rank` places."""
        missing = self.rank - self._given_rank
        if missing == 0:
            return x
        low, rest = x.split([self._given_rank, x.shape[axis] - self._given_rank], axis)
        zeros = x.new_zeros([missing if i == axis else n for i, n in enumerate(x.shape)])
        return torch.cat([low, zeros, rest], axis)

    def __call__(self, hidden: Tensor, keep: int) -> Tensor:
        """The mixer's output, (batch, L, d_model) in the compute dtype; differentiable in hidden.

        keep: see `svp_peft.ops.mixer_passes`; 0 without gradients.
        """
        if keep:
            return _Frozen.apply(hidden, self, keep)  # type: ignore[no-any-return]
        return self.forward(hidden, 0)[0]

    def forward(self, hidden: Tensor, keep: int) -> tuple[Tensor, ...]:
        """(out,) or, with `keep`, (out, x_dbl, y) or (out, x_dbl, y, xz, u)."""
        batch, length, width = hidden.shape
        shape = self._shape(hidden)
        rows = hidden.to(self.dtype).reshape(-1, width)
        xz = _product(rows, self.in_proj_t, self.in_bias)
        u = shape.convolve(xz)
        x_dbl = torch.bmm(u, self.x_proj_t)
        gated, y = shape.scan(u, x_dbl, xz, keep > 0)
        out = _product(gated, self.out_proj_t, self.out_bias).view(batch, length, -1)
        if keep == 2:
            return out, x_dbl, y, xz, u
        return (out, x_dbl, y) if keep else (out,)

    def backward(self, grad: Tensor, hidden: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
        """Gradient of hidden, in its dtype."""
        shape = self._shape(hidden)
        x_dbl, y, *rest = saved
        if rest:
            xz, u = rest
        else:
            rows = hidden.to(self.dtype).reshape(-1, hidden.shape[-1])
            xz = _product(rows, self.in_proj_t, self.in_bias)
            u = shape.convolve(xz)
        d_gated = torch.mm(grad.to(self.dtype).reshape(-1, grad.shape[-1]), self.out_proj)
        d_xz = torch.empty_like(xz)
        d_x_dbl = torch.empty_like(x_dbl)
        # where u is kept for another backward pass, its gradient needs a place of its own
        d_u = torch.empty_like(u) if rest else u
        d_delta = shape.scan_backward(d_gated, u, x_dbl, xz, y, d_xz, d_x_dbl, d_u)
        torch.bmm(d_delta, self.dt_proj, out=d_x_dbl[..., : self.rank])
        if shape.folds:
            shape.project_and_convolve_backward(d_u, d_x_dbl, self.x_proj, xz, d_xz)
        else:
            torch.baddbmm(d_u, d_x_dbl, self.x_proj, out=d_u)
            shape.convolve_backward(d_u, xz, d_xz)
        return torch.mm(d_xz, self.in_proj).view(hidden.shape).to(hidden.dtype)

    def _shape(self, hidden: Tensor) -> "_Shape":
        key = hidden.shape[0], hidden.shape[1]
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = _Shape(self, *key, hidden)
        return shape


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)


class _Frozen(torch.autograd.Function):
    """`FrozenMixer.forward` and `.backward` in autograd's hands."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, mixer: FrozenMixer, keep: int) -> Tensor:
        out, *saved = mixer.forward(hidden, keep)
        ctx.mixer = mixer
        ctx.save_for_backward(hidden, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        refuse_second()
        hidden, *saved = ctx.saved_tensors
        with without_autocast(hidden.device):
            return ctx.mixer.backward(grad, hidden, tuple(saved)), None, None


class _Shape:
    """The launches of one block for one batch size and length.

    u, d_u, d_delta are (K, tokens, d_inner), x_dbl and its gradient (K, tokens, dt_rank +
    2 d_state), xz and its gradient (tokens, 2 d_inner), all contiguous: so every address below is
    a base and a fixed distance. K is the number of directions, tokens = batch * L.
    """

    def __init__(self, mixer: FrozenMixer, batch: int, length: int, like: Tensor) -> None:
        w, dtype = mixer.weights, mixer.dtype
        self.dtype, self.device = dtype, like.device
        self.batch, self.length, self.channels = batch, length, mixer.channels
        self.tokens, self.directions = batch * length, mixer.directions
        self.rank, self.d_state = mixer.rank, mixer.d_state
        self.row = self.rank + 2 * self.d_state
        index = device_index(like)

        def empty(*sizes: int) -> Tensor:
            return torch.empty(sizes, device=like.device, dtype=dtype)

        # tensors of the true layout, for the kernels to be chosen by; they hold nothing
        xz = empty(batch, length, 2 * self.channels)
        u = empty(self.directions, batch, length, self.channels)
        x_dbl = empty(self.directions, batch, length, self.row)
        x, z = xz[..., : self.channels], xz[..., self.channels :]
        taps, conv_bias = parameters(w.conv_weight), parameters(w.conv_bias)
        self._alive = (taps, conv_bias, w)  # their addresses are kept below
        reverse = w.conv_reverse
        self._conv_parameters = (*pointers(taps), *pointers(conv_bias))
        both = 2 * self.channels
        self._conv, pack = _kernel_for("conv_forward", x, both, taps, conv_bias, reverse, (), both)
        self._chunk, self._conv_grid = _grid(index, batch, length, self.channels, pack, 8)
        assert taps is not None
        self.folds = _FOLD and supports(taps[0].shape[1], self.row, self.channels)
        if self.folds:
            self._conv_backward, self._conv_backward_grid, self._chunk_backward = projected_launch(
                index, dtype, batch, length, self.row, taps, conv_bias, reverse
            )
        else:
            self._conv_backward, _ = _kernel_for(
                "conv_backward", x, both, taps, conv_bias, reverse, (True, False, False), both,
                u[0].data_ptr(), xz.data_ptr(),
            )  # fmt: skip
            self._chunk_backward, self._conv_backward_grid = _grid(
                index, batch, length, self.channels, pack, 5
            )
        self._conv_sizes = (length, self.channels, both)

        rank, state = self.rank, self.d_state
        inputs = gather(
            tuple(u),
            tuple(x_dbl[..., :rank]),
            tuple(x_dbl[..., rank : rank + state]),
            tuple(x_dbl[..., rank + state :]),
            z, w.A_log, w.D, mixer.dt_weight, w.dt_bias,
            reverse=w.scan_reverse, softplus=True, scale=mixer.scale, A_is_log=True, fold=True,
            extra=[(u[0].data_ptr(), self.channels), (u[0].data_ptr(), self.channels)],
        )  # fmt: skip
        assert inputs.rank == rank
        self._scan_parameters = inputs.keep[5:]  # not the activations
        self._scan_tail = inputs.values[9:]
        self._scan = {save: forward_launch(inputs, save) for save in (False, True)}
        workers = _fast_warps(self.channels)
        self._parts = -(-self.channels // (32 * workers))
        self._scan_backward = _fast_kernel(index, inputs.macros, _NEED, workers)
        self._scan_backward_grid = (self._parts * self.directions * batch, 1, 1)
        self._reduce = _reduce_kernel(index, dtype, state, self.directions, True, True)
        threads = self.directions * self.tokens * state // 4
        self._reduce_grid = (-(-threads // 256), 1, 1)
        tiles = -(-length // _TILE)
        self._workspace = self.directions * batch * tiles * _TILE
        self._workspace *= _STASHED * self.channels
        self._partial = self._parts * self.directions * self.tokens * state

    def _two(self, base: int, elements: int) -> tuple[int, int]:
        """Addresses per direction of a (K, ...) half-precision buffer; 0 for an absent one."""
        return base, base + 2 * elements if self.directions == 2 else 0

    def convolve(self, xz: Tensor) -> Tensor:
        """u, (K, tokens, d_inner)."""
        u = xz.new_empty((self.directions, self.tokens, self.channels))
        self._conv(
            self._conv_grid,
            xz.data_ptr(), *self._conv_parameters,
            *self._two(u.data_ptr(), self.tokens * self.channels), 0, 0, 0, 0,
            *self._conv_sizes, 0, self._chunk,
        )  # fmt: skip
        return u

    def convolve_backward(self, d_u: Tensor, xz: Tensor, d_xz: Tensor) -> None:
        """Fill the first half of d_xz."""
        self._conv_backward(
            self._conv_backward_grid,
            xz.data_ptr(), *self._conv_parameters, 0, 0,
            *self._two(d_u.data_ptr(), self.tokens * self.channels), d_xz.data_ptr(), 0,
            *self._conv_sizes, 2 * self.channels, self._chunk_backward,
        )  # fmt: skip

    def project_and_convolve_backward(
        self, d_u: Tensor, d_x_dbl: Tensor, x_proj: Tensor, xz: Tensor, d_xz: Tensor
    ) -> None:
        """Fill the first half of d_xz, with d_u + d_x_dbl @ x_proj in the place of d_u."""
        self._conv_backward(
            self._conv_backward_grid,
            xz.data_ptr(), *self._conv_parameters,
            d_u.data_ptr(), d_x_dbl.data_ptr(), x_proj.data_ptr(), d_xz.data_ptr(),
            self.length, self._chunk_backward,
        )  # fmt: skip

    def _scan_activations(self, u: Tensor, x_dbl: Tensor, xz: Tensor) -> tuple[int, ...]:
        base, each = x_dbl.data_ptr(), self.tokens * self.row
        return (
            *self._two(u.data_ptr(), self.tokens * self.channels),
            *self._two(base, each),
            *self._two(base + 2 * self.rank, each),
            *self._two(base + 2 * (self.rank + self.d_state), each),
            xz.data_ptr() + 2 * self.channels,
        )

    def scan(self, u: Tensor, x_dbl: Tensor, xz: Tensor, save: bool) -> tuple[Tensor, Tensor]:
        """The gated sum and, if `save`, the ungated one; (tokens, d_inner)."""
        out = xz.new_empty((self.tokens, self.channels))
        y = xz.new_empty((self.tokens, self.channels)) if save else out
        self._scan[save](
            *self._scan_activations(u, x_dbl, xz), *self._scan_tail,
            out.data_ptr(), y.data_ptr() if save else 0,
        )  # fmt: skip
        return out, y

    def scan_backward(
        self,
        d_gated: Tensor,
        u: Tensor,
        x_dbl: Tensor,
        xz: Tensor,
        y: Tensor,
        d_xz: Tensor,
        d_x_dbl: Tensor,
        d_u: Tensor,
    ) -> Tensor:
        """Fill the second half of d_xz, the B and C of d_x_dbl, and d_u; returns d_delta.

        d_u may be u itself: a tile is read for the last time before its gradient is written.
        """
        each = self.tokens * self.channels
        d_delta = torch.empty_like(u)
        floats = torch.empty(
            2 * self._partial + self._workspace, device=self.device, dtype=torch.float32
        )
        parts_B = floats.data_ptr()
        parts_C = parts_B + 4 * self._partial
        self._scan_backward(
            self._scan_backward_grid,
            *self._scan_activations(u, x_dbl, xz), *self._scan_tail,
            d_gated.data_ptr(), y.data_ptr(),
            *self._two(d_u.data_ptr(), each),
            *self._two(d_delta.data_ptr(), each),
            d_xz.data_ptr() + 2 * self.channels,
            parts_B, parts_C, parts_C + 4 * self._partial, 0,
            0, 0, 0, 2 * self.channels,
        )  # fmt: skip
        d_B = d_x_dbl.data_ptr() + 2 * self.rank
        row = self.tokens * self.row
        self._reduce(
            self._reduce_grid,
            parts_B, parts_C, *self._two(d_B, row), *self._two(d_B + 2 * self.d_state, row),
            self._parts, self.tokens, self.row, self.row,
        )  # fmt: skip
        return d_delta
