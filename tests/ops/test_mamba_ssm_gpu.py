"""Backend `mamba_ssm` with the real packages, on a GPU, against the reference in float64.

Bounds, as relative L2 error: float32 1e-5 (their kernels use the fast exp and add gradients up in
any order), bfloat16 2e-2 (delta and each direction's y are rounded, and gradients come through
both), float16 an eighth of it.
"""

from collections.abc import Iterator

import pytest
import torch

from svp_peft import ops
from svp_peft.ops import mamba_ssm
from tests.ops.cuda_cases import Case, error, map_tensors, scan_case, scan_truth
from tests.ops.test_compositions import gradients, named_leaves
from tests.ops.test_mamba_ssm import _mixer_weights

_REASON = mamba_ssm.unavailable(torch.device("cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_REASON is not None, reason=str(_REASON)),
]

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}

# The gradient of A is that of exp(delta A) h_{t-1}, and with one token h_0 = 0: the truth is zero.
# mamba-ssm takes exp(delta A) h_{t-1} as h_t - (delta u) B, with h_t a rounded float32: where the
# compiler makes one fused multiply-add of it, half an ulp of h_t is left, 2^-24. Four times that,
# because delta is rounded too.
_RESIDUE = 2.0**-22


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("length", [1, 2, 3, 64, 197, 785])
@pytest.mark.parametrize(
    "options",
    [{}, {"directions": 1, "backwards": True}, {"gate": False, "skip": False}],
    ids=str,
)
def test_scan_is_right_with_every_gradient(options: dict, length: int, dtype: torch.dtype) -> None:
    case = scan_case(2, length, 64, 16, 12, dtype, "cuda", seed=length, **options)
    true_out, true_y, truth = scan_truth(case)
    leaves = map_tensors(case.arguments, lambda t: t.detach().requires_grad_())
    out, y = ops.scan(*leaves, **case.options, backend="mamba_ssm")
    assert error(out, true_out) < BOUNDS[dtype], "out"
    assert error(y, true_y) < BOUNDS[dtype], "y"
    out.backward(case.grad_out)
    for name, leaf, expected in zip(truth, leaves, truth.values(), strict=True):
        if leaf is None:
            continue
        single = isinstance(leaf, torch.Tensor)
        pairs = ((leaf, expected),) if single else tuple(zip(leaf, expected, strict=True))
        for k, (a, b) in enumerate(pairs):
            if name == "dA" and length == 1:
                assert not b.any()
                excess = (a.grad.abs() / _cancelling_terms_of_dA(case, k)).max().item()
                assert excess < _RESIDUE, f"{name}[{k}]: {excess}"
            else:
                assert error(a.grad, b) < BOUNDS[dtype], f"{name}[{k}]"


def _cancelling_terms_of_dA(case: Case, k: int) -> torch.Tensor:
    """What h_1 alone contributes to the gradient of A_log (d_inner, d_state), L = 1, absolute."""
    u, dt, B, C, z, A_log, _, dt_weight, dt_bias = map_tensors(case.arguments, torch.Tensor.double)
    delta = torch.nn.functional.softplus(dt[k] @ dt_weight[k].T + dt_bias[k])
    grad_y = case.grad_out.double() * case.options["scale"]
    if z is not None:
        grad_y = grad_y * torch.nn.functional.silu(z)
    terms = (grad_y * delta.square() * u[k])[..., None] * (B[k] * C[k])[:, :, None]
    return terms.abs().sum((0, 1)) * A_log[k].exp()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("reverse", [(False, True), (True,)], ids=str)
def test_conv_is_right(reverse: tuple[bool, ...], dtype: torch.dtype) -> None:
    x = torch.randn(3, 65, 128, device="cuda").to(dtype)[..., :64]
    weight = [torch.randn(64, 4, device="cuda") for _ in reverse]
    bias = [torch.randn(64, device="cuda") for _ in reverse]
    truth = ops.conv_silu(x.double(), weight, bias, reverse, backend="reference")
    found = ops.conv_silu(x, weight, bias, reverse, backend="mamba_ssm")
    for a, b in zip(found, truth, strict=True):
        assert error(a, b) < BOUNDS[dtype]


@pytest.mark.parametrize(("convs", "scans"), [(1, 1), (1, 2), (2, 2)])
def test_mixer_is_right_with_every_gradient(convs: int, scans: int) -> None:
    weights = ops.MixerWeights(
        *map_tensors(
            tuple(_mixer_weights(convs, scans)),
            lambda t: t.detach().cuda().requires_grad_(),
        )
    )
    hidden = torch.randn(2, 65, 4, device="cuda", requires_grad=True)
    cotangent = torch.randn_like(hidden)
    leaves = named_leaves(hidden, weights)
    out = ops.mixer(hidden, weights, scale=0.5, backend="mamba_ssm")
    double = ops.MixerWeights(*map_tensors(tuple(weights), torch.Tensor.double))
    truth = ops.mixer(hidden.double(), double, scale=0.5, backend="reference")
    assert error(out, truth) < BOUNDS[torch.float32]
    expected = gradients(truth, leaves, cotangent.double())
    for name, found in gradients(out, leaves, cotangent).items():
        assert error(found, expected[name]) < BOUNDS[torch.float32], name
