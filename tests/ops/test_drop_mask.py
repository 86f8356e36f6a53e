"""Stochastic depth inside `ops.add_norm`: one number per image multiplies the block's input."""

import pytest
import torch

from svp_peft import ops
from svp_peft.vim.block import DropPath

DEVICES = [
    pytest.param("cpu"),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_drop_mask_is_the_same_as_multiplying_first(dtype: torch.dtype, device: str) -> None:
    shape = (4, 5, 24)
    hidden = torch.randn(*shape, device=device).to(dtype).requires_grad_()
    residual = torch.randn(*shape, device=device).requires_grad_()
    weight = torch.randn(24, device=device).requires_grad_()
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0], device=device)
    grads = [torch.randn(*shape, device=device).to(dtype), torch.randn(*shape, device=device)]
    leaves = (hidden, residual, weight)

    fused = ops.add_norm(hidden, residual, weight, None, drop_mask=mask, drop_scale=1.25)
    found = torch.autograd.grad(fused, leaves, grads)
    kept = hidden.double() * (1.25 * mask.double())[:, None, None]
    plain = ops.add_norm(kept, residual.double(), weight.double(), None, backend="reference")
    expected = torch.autograd.grad(plain, leaves, [g.double() for g in grads])

    # bfloat16 rounds results, and on a CPU the masked input too, to 8 bits
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for a, b in zip((*fused, *found), (*plain, *expected), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)
    assert (found[0][1] == 0).all(), "nothing flows back into a dropped image's input"


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_that_drops_everything_draws_a_mask_of_zeros(device: str) -> None:
    x = torch.ones(3, 2, 4, device=device)
    mask = DropPath(1.0).train().draw(x)
    assert mask is not None
    assert not mask.any()
    assert DropPath(1.0).eval().draw(x) is None
    assert DropPath(0.0).train().draw(x) is None
