"""The launches between two mixers of a stack: prompts, drop, residual add and norm, and back."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svp_peft.ops.cuda import norm as norms
from svp_peft.ops.cuda import prompt as prompts
from svp_peft.ops.cuda.kernels import CPP_TYPE, Kernel, multiprocessors, shared_memory_limit
from svp_peft.ops.cuda.layout import device_index, element_size, pack_of
from svp_peft.ops.cuda.prompter_copies import Packed
from svp_peft.ops.types import FrozenBlock

_PROMPT_NORM_LAYOUT = "11Q4i2f"
_PROMPT_UP_NORM_LAYOUT = "13Q3i2f4x"
_TILE = 16  # tokens of a tile of prompt_up_norm
_TILE_WARPS = 16  # that share one; a divisor of 16
_BLOCKS = 2  # of a multiprocessor at a time, at most
_TWICE = 384  # widest d_model for which two have registers enough
_WIDEST, _DEEPEST = 768, 128  # d_model and bottleneck that prompt_up_norm is built for


class StackKernels:
    """Kernels chosen once for all blocks of a stack, for tensors without gaps.

    x, gradients of it and pre-activations are (tokens, ...) in the mixers' dtype, `total` is the
    residual stream. A `mask` is (address, scale) as `frozen_stack` draws it, (0, 1.0) for none.
    """

    def __init__(self, x: Tensor, residual: Tensor, blocks: Sequence[FrozenBlock]) -> None:
        self.batch, self.length, self.width = x.shape
        self.tokens = self.batch * self.length
        self.x_dtype, self.residual_dtype, self.device = x.dtype, residual.dtype, x.device
        self.blocks, self.index = blocks, device_index(x)
        given = [block.prompt for block in blocks if block.prompt is not None]
        self.skip = given[0].skip if given else ()
        self._bottleneck = given[0].projections[2].shape[0] if given else 0
        self.row = self.width + self._bottleneck  # of [cross | middle]
        parameters = [t for b in blocks for t in (b.norm_weight, b.norm_bias) if t is not None]
        parameters += [t for prompt in given for t in (prompt.alpha, prompt.beta)]
        units = {t.data_ptr() // element_size(t.dtype) for t in parameters}
        self._norm_pack = pack_of(self.width, 4, self.row, *units)
        self._pack = pack_of(self.width, 8, self.row)
        self._weight = blocks[0].norm_weight.dtype
        bias = blocks[0].norm_bias
        self._bias = None if bias is None else bias.dtype
        self._eps, self._rms = blocks[0].eps, blocks[0].rms

    def _norm(self, entry: str, mask: int, backward: bool, grad_total: bool) -> Kernel:
        return norms._kernel(
            entry, self.index, self.width, self._norm_pack, self._rms,
            self._bias is not None and not backward, True, mask != 0, grad_total, False, False,
            *norms._types(self.x_dtype, self.residual_dtype, self.residual_dtype),
            *norms._types(self._weight, None if backward else self._bias),
        )  # fmt: skip

    def add_norm(
        self, number: int, x: Tensor, residual: Tensor, mask: tuple[int, float]
    ) -> tuple[Tensor, Tensor]:
        """(normed, total) of a block without a prompt."""
        block = self.blocks[number]
        normed, total = torch.empty_like(x), torch.empty_like(residual)
        self._norm("add_norm_forward", mask[0], False, False)(
            (-(-self.tokens // norms._WARPS), 1, 1),
            x.data_ptr(), residual.data_ptr(), block.norm_weight.data_ptr(),
            norms._address(block.norm_bias), normed.data_ptr(), total.data_ptr(), 0, 0, 0,
            mask[0], self.tokens, self.length, self._eps, mask[1],
        )  # fmt: skip
        return normed, total

    def prompt_norm(
        self,
        number: int,
        x: Tensor,
        joint: Tensor,
        inner: Tensor,
        residual: Tensor,
        mask: tuple[int, float],
    ) -> tuple[Tensor, Tensor]:
        """(normed, total) of a block with a prompt."""
        block = self.blocks[number]
        prompt = block.prompt
        assert prompt is not None
        normed, total = torch.empty_like(x), torch.empty_like(residual)
        kernel = _prompt_norm_kernel(
            self.index, CPP_TYPE[self.x_dtype], CPP_TYPE[self.residual_dtype],
            *norms._types(self._weight, self._bias), self.width, self._norm_pack, self._rms,
            self._bias is not None, mask[0] != 0, self.skip,
        )  # fmt: skip
        kernel(
            (-(-self.tokens // norms._WARPS), 1, 1),
            x.data_ptr(), joint.data_ptr(), inner.data_ptr(),
            prompt.alpha.data_ptr() + 4 * prompt.alpha_row * self.width,
            prompt.beta.data_ptr() + 4 * prompt.beta_row * self.width,
            residual.data_ptr(), block.norm_weight.data_ptr(), norms._address(block.norm_bias),
            normed.data_ptr(), total.data_ptr(), mask[0],
            self.tokens, self.length, joint.shape[1], self.width, self._eps, mask[1],
        )  # fmt: skip
        return normed, total

    @property
    def has_prompt_up_norm(self) -> bool:
        """Whether `prompt_up_norm` serves these sizes on this GPU."""
        fits = 0 < self._bottleneck <= _DEEPEST and self.width <= _WIDEST
        wanted = _tile_bytes(self.width, self._bottleneck)
        return fits and wanted <= shared_memory_limit(self.index)

    def prompt_up_norm(
        self,
        number: int,
        x: Tensor,
        joint: Tensor,
        packed: Packed,
        residual: Tensor,
        mask: tuple[int, float],
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(normed, total, inner where it is to be kept) of a block with a prompt.

        Args:
            joint: (tokens, row or more), what is behind [cross | middle] is not read.
        """
        block = self.blocks[number]
        prompt = block.prompt
        assert prompt is not None
        normed, total = torch.empty_like(x), torch.empty_like(residual)
        inner = x.new_empty(self.tokens, self.width) if keep else None
        kernel, at_once = _prompt_up_norm_kernel(
            self.index, self.width, self._bottleneck, keep,
            CPP_TYPE[self.x_dtype], CPP_TYPE[self.residual_dtype],
            *norms._types(self._weight, self._bias), self.width, self._norm_pack, self._rms,
            self._bias is not None, mask[0] != 0, self.skip,
        )  # fmt: skip
        kernel(
            (min(-(-self.tokens // _TILE), at_once), 1, 1),
            x.data_ptr(), joint.data_ptr(), packed.up.data_ptr(), packed.up_bias.data_ptr(),
            norms._address(inner),
            prompt.alpha.data_ptr() + 4 * prompt.alpha_row * self.width,
            prompt.beta.data_ptr() + 4 * prompt.beta_row * self.width,
            residual.data_ptr(), block.norm_weight.data_ptr(), norms._address(block.norm_bias),
            normed.data_ptr(), total.data_ptr(), mask[0],
            self.tokens, self.length, joint.shape[1], self._eps, mask[1],
        )  # fmt: skip
        return normed, total, inner

    def add_norm_backward(
        self,
        number: int,
        d_normed: Tensor,
        d_total: Tensor | None,
        total: Tensor,
        mask: tuple[int, float],
        d_residual: Tensor,
    ) -> Tensor:
        """Gradient of x; the residual's goes to `d_residual`, which may be `d_total` itself."""
        d_x = torch.empty_like(d_normed)
        blocks = max(1, min(-(-self.tokens // norms._WARPS), 8 * multiprocessors(self.index)))
        self._norm("add_norm_backward", mask[0], True, d_total is not None)(
            (blocks, 1, 1),
            d_normed.data_ptr(), 0, self.blocks[number].norm_weight.data_ptr(), 0,
            d_x.data_ptr(), total.data_ptr(), norms._address(d_total), d_residual.data_ptr(), 0,
            mask[0], self.tokens, self.length, self._eps, mask[1],
        )  # fmt: skip
        return d_x

    @property
    def partial_sums(self) -> int:
        """Blocks of `prompt_backward`, each of which writes (4, d_model) partial sums."""
        # few: adding them up is a pass of its own
        wanted = -(-self.tokens // (4 * prompts._rows_of_block(self.width // self._pack)))
        return min(wanted, 3 * multiprocessors(self.index))

    def prompt_backward(
        self, number: int, grad: Tensor, joint: Tensor, inner: Tensor, partial: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(d_joint, of which the first d_model columns are filled, d_inner).

        partial: float32 (partial_sums, 4, d_model), written: shares of the sums over the tokens
            that are the gradients of alpha, beta, b and d.
        """
        prompt = self.blocks[number].prompt
        assert prompt is not None
        d_joint, d_inner = torch.empty_like(joint), torch.empty_like(inner)
        kernel = prompts._kernel(
            "prompt_backward", self.index, CPP_TYPE[self.x_dtype], self.width, self._pack, True,
            True, self.skip,
        )  # fmt: skip
        kernel(
            (partial.shape[0], 1, 1),
            grad.data_ptr(), joint.data_ptr(), inner.data_ptr(),
            prompt.alpha.data_ptr() + 4 * prompt.alpha_row * self.width,
            prompt.beta.data_ptr() + 4 * prompt.beta_row * self.width,
            0, d_joint.data_ptr(), d_inner.data_ptr(), partial.data_ptr(),
            self.tokens, self.length, self.row, self.width, self.row,
        )  # fmt: skip
        return d_joint, d_inner


def _prompt_macros(
    act: str,
    residual: str,
    weight: str,
    bias: str,
    width: int,
    pack: int,
    rms: bool,
    has_bias: bool,
    has_mask: bool,
    skip: tuple[int, ...],
) -> dict[str, object]:
    return {
        "ACT": act,
        "RESIDUAL_T": residual,
        "W_T": weight,
        "BIAS_T": bias,
        "D_MODEL": width,
        "PACK": pack,
        "RMS": rms,
        "HAS_BIAS": has_bias,
        "HAS_MASK": has_mask,
        "IS_SKIPPED(t)": prompts._is_skipped(skip),
    }


@functools.cache
def _prompt_norm_kernel(device: int, *choices: Any) -> Kernel:
    """`choices` are the arguments of `_prompt_macros`."""
    return Kernel(
        "prompt_norm", "prompt_norm_forward", _prompt_macros(*choices), _PROMPT_NORM_LAYOUT,
        device, threads=32 * norms._WARPS,
    )  # fmt: skip


@functools.cache
def _prompt_up_norm_kernel(
    device: int, width: int, bottleneck: int, keep: bool, *choices: Any
) -> tuple[Kernel, int]:
    """The kernel and how many blocks of it run at a time; for `choices` see `_prompt_macros`."""
    shared = _tile_bytes(width, bottleneck)
    # two where shared memory has room for them (a KiB of each block is the system's) and, in rows
    # that wide, registers have
    room = (shared_memory_limit(device) + 1024) // (shared + 1024)
    blocks = max(1, min(_BLOCKS, room)) if width <= _TWICE else 1
    macros = _prompt_macros(*choices) | {
        "BOTTLENECK": bottleneck,
        "TILE_WARPS": _TILE_WARPS,
        "BLOCKS": blocks,
        "KEEPS_INNER": keep,
        "SHARED_BYTES": shared,
    }
    kernel = Kernel(
        "prompt_up_norm", "prompt_up_norm_forward", macros, _PROMPT_UP_NORM_LAYOUT, device,
        threads=32 * _TILE_WARPS, shared=shared,
    )  # fmt: skip
    return kernel, blocks * multiprocessors(device)


def _tile_bytes(width: int, bottleneck: int) -> int:
    """Shared memory of prompt_up_norm: U, middle of two tiles, inner of one."""
    pitch = -(-bottleneck // 16) * 16 + 8
    return 2 * ((width + 2 * _TILE) * pitch + _TILE * (width + 8))
