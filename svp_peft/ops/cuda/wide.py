"""Products of halves whose sums stay in float32."""

import torch
from torch import Tensor

# torch 2.8 and newer write a product of halves in float32 without a pass of its own
WIDE_PRODUCTS = "dtype_out" in torch.ops.aten.mm.overloads()


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a @ b in `dtype`, written to `out` if that is given."""
    if a.dtype == dtype:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if WIDE_PRODUCTS and dtype == torch.float32:
        if out is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    product = torch.mm(a, b)
    return product.to(dtype) if out is None else out.copy_(product)
