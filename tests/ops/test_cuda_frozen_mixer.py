"""The prepared mixer of a frozen block against the general way and the float64 reference."""

import pytest
import torch

from svp_peft import ops
from svp_peft.ops import mixer_op, reference
from svp_peft.ops.types import Cache, MixerWeights
from tests.ops.cuda_cases import mixer_weights

pytestmark = pytest.mark.gpu


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("keep_everything", [0, 1 << 40], ids=["recompute", "keep"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(
    ("batch", "length", "d_model", "rank", "state"),
    [
        (3, 1, 32, 8, 16),
        (2, 2, 64, 8, 8),
        (1, 65, 64, 16, 16),
        (5, 197, 384, 24, 16),
        (4, 197, 192, 12, 16),
    ],
)
def test_prepared_mixer_is_as_exact_as_the_general_one(
    batch, length, d_model, rank, state, directions, keep_everything, monkeypatch
):
    monkeypatch.setitem(mixer_op._KEEP_EVERYTHING, "cuda", keep_everything)
    w = mixer_weights(d_model, rank, state, directions, bias=length == 65, device="cuda")
    x = torch.randn(batch, length, d_model, device="cuda", dtype=torch.bfloat16)
    cotangent = torch.randn_like(x)

    exact_x = x.double().requires_grad_()
    exact_w = MixerWeights(
        *(
            f if f is None else tuple(t.double() for t in f) if isinstance(f, tuple) else f.double()
            for f in w
        )
    )
    exact = reference.mixer(exact_x, exact_w, scale=0.5)
    (exact_grad,) = torch.autograd.grad(exact, exact_x, cotangent.double())

    errors = []
    for cache in (None, Cache()):
        leaf = x.clone().requires_grad_()
        out = ops.mixer(leaf, w, scale=0.5, cache=cache, backend="cuda")
        (grad,) = torch.autograd.grad(out, leaf, cotangent)
        errors.append((relative(out, exact.detach()), relative(grad, exact_grad)))
        assert cache is None or cache.prepared is not None
        with torch.no_grad():
            again = ops.mixer(x, w, scale=0.5, cache=cache, backend="cuda")
        # inference may take the kernel for few images, which adds in another order
        assert relative(again, out.detach().double()) < 1e-2
    (general_out, general_grad), (out_error, grad_error) = errors
    # the same roundings to bfloat16 at the same places; the products may be split differently
    assert out_error <= 1.1 * general_out + 1e-4
    assert grad_error <= 1.1 * general_grad + 1e-4


def test_prepared_mixer_follows_a_weight_that_is_written_to():
    w = mixer_weights(64, 8, 16, 2, bias=True, device="cuda")
    x = torch.randn(2, 9, 64, device="cuda", dtype=torch.bfloat16)
    cache = Cache()
    with torch.no_grad():
        ops.mixer(x, w, cache=cache, backend="cuda")
        address = cache.prepared.in_proj.data_ptr()
        for tensor in (w.in_proj_weight, w.x_proj_weight[1], w.A_log[0], w.conv_weight[1]):
            tensor.mul_(1.5)
            found = ops.mixer(x, w, cache=cache, backend="cuda")
            expected = ops.mixer(x, w, cache=Cache(), backend="cuda")
            assert torch.equal(found, expected)
    assert cache.prepared.in_proj.data_ptr() == address, "a captured graph would read freed memory"


def test_other_sizes_and_types_take_the_general_way():
    x = torch.randn(2, 9, 64, device="cuda")
    with torch.no_grad():
        cache = Cache()
        ops.mixer(x, mixer_weights(64, 8, 16, 2, device="cuda"), cache=cache, backend="cuda")
        assert cache.prepared is None, "float32"
        cache = Cache()
        w = mixer_weights(64, 72, 16, 2, device="cuda")
        ops.mixer(x.bfloat16(), w, cache=cache, backend="cuda")
        assert cache.prepared is None, "a rank that the scan leaves to a product"
