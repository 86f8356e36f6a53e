"""The two SVP prompts added to the tokens, on the GPU."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from svp_peft.ops.cuda.kernels import CPP_TYPE, Kernel, multiprocessors
from svp_peft.ops.cuda.layout import device_index, element_size, pack_of, rows

_LAYOUT = "3Q2Q3QQ5i4x"


def prompt(
    x: Tensor,
    cross: Tensor | None,
    inner: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    skip: Sequence[int],
) -> Tensor:
    """See `svp_peft.ops.reference.prompt`: prompted tokens, (batch, L, d_model)."""
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    if x.numel() == 0:
        return out
    x = x.contiguous()
    cross, cross_row = _laid_out(cross, x.dtype)
    inner, inner_row = _laid_out(inner, x.dtype)
    alpha, beta = _scale(alpha), _scale(beta)
    batch, length, width = x.shape
    kernel, pack = _kernel_for("prompt_forward", x, cross, cross_row, inner, inner_row, skip)
    threads = batch * length * (width // pack)
    kernel(
        (-(-threads // 256), 1, 1),
        x.data_ptr(), _address(cross), _address(inner), _address(alpha), _address(beta),
        out.data_ptr(), 0, 0, 0, batch * length, length, cross_row, inner_row, 0,
    )  # fmt: skip
    return out


def prompt_backward(
    grad: Tensor,
    cross: Tensor | None,
    inner: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    skip: Sequence[int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `prompt` with respect to cross, inner, alpha and beta; that of x is `grad`."""
    if cross is None and inner is None:
        return None, None, None, None
    grad = grad.contiguous()
    batch, length, width = grad.shape
    cross, cross_row = _laid_out(cross, grad.dtype)
    inner, inner_row = _laid_out(inner, grad.dtype)
    alpha, beta = _scale(alpha), _scale(beta)
    dcross = None if cross is None else torch.empty_like(grad)
    dinner = None if inner is None else torch.empty_like(grad)
    tokens = batch * length
    if tokens == 0:
        sums = torch.zeros(4, width, device=grad.device)
    else:
        kernel, pack = _kernel_for(
            "prompt_backward", grad, cross, cross_row, inner, inner_row, skip, width, dcross
        )
        # few partial sums: adding them up is a launch of its own, as long as a short kernel
        wanted = -(-tokens // (4 * _rows_of_block(width // pack)))
        blocks = min(wanted, 3 * multiprocessors(kernel.device))
        partial = torch.empty((blocks, 4, width), device=grad.device, dtype=torch.float32)
        kernel(
            (blocks, 1, 1),
            grad.data_ptr(), _address(cross), _address(inner), _address(alpha), _address(beta),
            0, _address(dcross), _address(dinner), partial.data_ptr(),
            tokens, length, cross_row, inner_row, width,
        )  # fmt: skip
        sums = partial.sum(0)
    dalpha = None if cross is None else sums[0]
    dbeta = None if inner is None else sums[1]
    return dcross, dinner, dalpha, dbeta


def _rows_of_block(lanes: int) -> int:
    """Tokens that a block of the backward kernel takes at once; ROWS in prompt.cu."""
    return 1 if lanes >= 192 else 192 // lanes


def _threads_of_block(lanes: int) -> int:
    """THREADS in prompt.cu."""
    return min(1024, _rows_of_block(lanes) * lanes)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _laid_out(x: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, int]:
    return (None, 0) if x is None else rows(x.to(dtype))


def _scale(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _kernel_for(
    entry: str,
    x: Tensor,
    cross: Tensor | None,
    cross_row: int,
    inner: Tensor | None,
    inner_row: int,
    skip: Sequence[int],
    other_row: int = 0,
    other: Tensor | None = None,
) -> tuple[Kernel, int]:
    size = element_size(x.dtype)
    units = [t.data_ptr() // size for t in (x, cross, inner, other) if t is not None]
    pack = pack_of(x.shape[2], 16 // size, cross_row, inner_row, other_row, *units)
    index = device_index(x)
    kernel = _kernel(
        entry, index, CPP_TYPE[x.dtype], x.shape[2], pack, cross is not None, inner is not None,
        tuple(skip),
    )  # fmt: skip
    return kernel, pack


def _is_skipped(skip: Sequence[int]) -> str:
    """The C++ expression for "token t is a class token"."""
    return "||".join(f"(t)=={position}" for position in skip) or "false"


@functools.cache
def _kernel(
    entry: str,
    device: int,
    act: str,
    width: int,
    pack: int,
    has_cross: bool,
    has_inner: bool,
    skip: tuple[int, ...],
) -> Kernel:
    macros = {
        "ACT": act,
        "D_MODEL": width,
        "PACK": pack,
        "HAS_CROSS": has_cross,
        "HAS_INNER": has_inner,
        "IS_SKIPPED(t)": _is_skipped(skip),
    }
    threads = 256 if entry == "prompt_forward" else _threads_of_block(width // pack)
    return Kernel("prompt", entry, macros, _LAYOUT, device, threads=threads)
