"""Residual add and normalisation on the GPU."""

import functools

import torch
from torch import Tensor

from svp_peft.ops.cuda.kernels import CPP_TYPE, Kernel, multiprocessors
from svp_peft.ops.cuda.layout import device_index, element_size, pack_of, parameter

_LAYOUT = "10Q2i2f"
_WARPS = 4


def add_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    rms: bool,
    residual_dtype: torch.dtype,
    mask: Tensor | None = None,
    mask_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See `svp_peft.ops.reference.add_norm`: (y, residual_out), both (..., d_model).

    Args:
        mask: float32 (batch,): hidden is multiplied by mask * mask_scale, image by image.
    """
    hidden = hidden.contiguous()
    residual = None if residual is None else residual.contiguous()
    weight, bias = parameter(weight), None if bias is None else parameter(bias)
    y = torch.empty_like(hidden)
    total = torch.empty_like(hidden, dtype=residual_dtype)
    width = hidden.shape[-1]
    tokens = hidden.numel() // max(1, width)
    if tokens == 0:
        return y, total
    pack = _pack(width, hidden, residual, weight, bias)
    kernel = _kernel(
        "add_norm_forward", device_index(hidden), width, pack, rms, bias is not None,
        residual is not None, mask is not None, False, False, False,
        *_types(hidden.dtype, None if residual is None else residual.dtype, residual_dtype),
        *_types(weight.dtype, None if bias is None else bias.dtype),
    )  # fmt: skip
    kernel(
        (-(-tokens // _WARPS), 1, 1),
        hidden.data_ptr(), _address(residual), weight.data_ptr(), _address(bias),
        y.data_ptr(), total.data_ptr(), 0, 0, 0, _address(mask), tokens,
        hidden.shape[-2] if mask is not None else 1, eps, mask_scale,
    )  # fmt: skip
    return y, total


def add_norm_backward(
    grad_y: Tensor,
    grad_residual_out: Tensor | None,
    residual_out: Tensor,
    weight: Tensor,
    *,
    eps: float,
    rms: bool,
    need_weight: bool,
    need_bias: bool,
    hidden_dtype: torch.dtype,
    residual_in_dtype: torch.dtype | None,
    mask: Tensor | None = None,
    mask_scale: float = 1.0,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `add_norm`: dhidden, dresidual (None without a residual), dweight, dbias.

    Where both have one dtype and there is no mask, dhidden and dresidual are the same tensor.
    """
    grad_y = grad_y.to(hidden_dtype).contiguous()
    residual_out = residual_out.contiguous()
    if grad_residual_out is not None:
        grad_residual_out = grad_residual_out.to(residual_out.dtype).contiguous()
    weight = parameter(weight)
    dhidden = torch.empty_like(grad_y)
    dresidual = None
    same = residual_in_dtype == hidden_dtype and mask is None
    if residual_in_dtype is not None and not same:
        dresidual = torch.empty_like(grad_y, dtype=residual_in_dtype)
    width = grad_y.shape[-1]
    tokens = grad_y.numel() // max(1, width)
    index = device_index(grad_y)
    blocks = max(1, min(-(-tokens // _WARPS), 8 * multiprocessors(index)))
    partial = None
    if need_weight or need_bias:
        make = torch.zeros if tokens == 0 else torch.empty
        partial = make((blocks, 2, width), device=grad_y.device, dtype=torch.float32)
    if tokens:
        kernel = _kernel(
            "add_norm_backward", index, width,
            _pack(width, grad_y, grad_residual_out, residual_out, weight),
            rms, False, dresidual is not None, mask is not None, grad_residual_out is not None,
            need_weight, need_bias, *_types(hidden_dtype, residual_in_dtype, residual_out.dtype),
            *_types(weight.dtype, None),
        )  # fmt: skip
        kernel(
            (blocks, 1, 1),
            grad_y.data_ptr(), 0, weight.data_ptr(), 0, dhidden.data_ptr(),
            residual_out.data_ptr(), _address(grad_residual_out), _address(dresidual),
            _address(partial), _address(mask), tokens,
            grad_y.shape[-2] if mask is not None else 1, eps, mask_scale,
        )  # fmt: skip
    if same:
        dresidual = dhidden
    if partial is None:
        return dhidden, dresidual, None, None
    sums = partial.sum(0)
    return dhidden, dresidual, sums[0] if need_weight else None, sums[1] if need_bias else None


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _types(*dtypes: torch.dtype | None) -> tuple[str, ...]:
    return tuple("float" if d is None else CPP_TYPE[d] for d in dtypes)


def _pack(width: int, *tensors: Tensor | None) -> int:
    units = [x.data_ptr() // element_size(x.dtype) for x in tensors if x is not None]
    return pack_of(width, 4, *units)


@functools.cache
def _kernel(
    entry: str,
    device: int,
    width: int,
    pack: int,
    rms: bool,
    has_bias: bool,
    has_residual: bool,
    has_mask: bool,
    has_grad_residual: bool,
    need_weight: bool,
    need_bias: bool,
    hidden: str,
    residual_in: str,
    residual: str,
    weight: str,
    bias: str,
) -> Kernel:
    macros = {
        "HIDDEN_T": hidden,
        "RESIDUAL_IN_T": residual_in,
        "RESIDUAL_T": residual,
        "W_T": weight,
        "BIAS_T": bias,
        "D_MODEL": width,
        "PACK": pack,
        "RMS": rms,
        "HAS_BIAS": has_bias,
        "HAS_RESIDUAL": has_residual,
        "HAS_MASK": has_mask,
        "HAS_GRAD_RESIDUAL": has_grad_residual,
        "NEED_WEIGHT": need_weight,
        "NEED_BIAS": need_bias,
    }
    return Kernel("norm", entry, macros, _LAYOUT, device, threads=32 * _WARPS)
